// Throws what torch turns into torch.OutOfMemoryError. Built against the installed torch where there
// is a compiler (see out_of_memory.py), because the exception's type is torch's own; nothing else of
// Penstock includes torch.
#include <c10/util/Exception.h>

#include <cstring>
#include <string>

extern "C" {

__attribute__((visibility("default"))) void penstock_throw_out_of_memory(const char* message) {
  throw c10::OutOfMemoryError({"penstock_malloc", "penstock", 0}, message);
}

// Whether torch would know it: throws, and catches as torch's binding does.
__attribute__((visibility("default"))) int penstock_can_throw_out_of_memory() {
  try {
    penstock_throw_out_of_memory("test");
  } catch (const c10::OutOfMemoryError& error) {
    return std::strcmp(error.what_without_backtrace(), "test") == 0 ? 1 : 0;
  } catch (...) {
    return 0;
  }
  return 0;
}
}
