# Finds the CUDA toolkit. Only the runtime is needed, and it is linked statically: driver calls go
# through its entry-point query, so the result loads on machines without a GPU or a driver.
set(PENSTOCK_HAS_CUDA OFF)
if(NOT PENSTOCK_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit 12.4 QUIET)
  if(CUDAToolkit_FOUND AND TARGET CUDA::cudart_static)
    set(PENSTOCK_HAS_CUDA ON)
    message(STATUS "Penstock: CUDA toolkit ${CUDAToolkit_VERSION}")
  elseif(PENSTOCK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PENSTOCK_CUDA=ON, but no CUDA toolkit 12.4 or newer was found. "
                        "Set CUDAToolkit_ROOT, or build with PENSTOCK_CUDA=OFF.")
  else()
    message(STATUS "Penstock: no CUDA toolkit 12.4 or newer; building the host device only")
  endif()
endif()
