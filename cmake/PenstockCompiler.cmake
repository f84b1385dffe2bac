# What every target of the project is compiled with.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

# Arguments of lambdas for Python shadow what they are for; such warnings are no errors.
set(not_bindings $<NOT:$<STREQUAL:$<TARGET_PROPERTY:NAME>,_core>>)
add_library(penstock_options INTERFACE)
target_compile_options(penstock_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
                       $<$<AND:$<BOOL:${PENSTOCK_WERROR}>,${not_bindings}>:-Werror>)
target_link_libraries(penstock_options INTERFACE Threads::Threads)

if(PENSTOCK_SANITIZE)
  set(flags -fsanitize=${PENSTOCK_SANITIZE} -fno-omit-frame-pointer -g)
  target_compile_options(penstock_options INTERFACE ${flags})
  target_link_options(penstock_options INTERFACE ${flags})
endif()
