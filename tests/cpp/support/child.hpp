// Runs a function in a forked child and tells how that ended. The child leaves without exit
// handlers, as multiprocessing's children do, and is killed where it hangs.
#pragma once

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <stdexcept>

namespace penstock::testing {

struct ChildEnd {
  int exit_code = -1;  ///< What the function returned; -1 where a signal ended the child.
  int signal = 0;
};

template <typename Function>
ChildEnd run_in_child(Function function) {
  const pid_t child = ::fork();
  if (child < 0) throw std::runtime_error("fork");
  if (child == 0) {
    const rlimit no_core{0, 0};
    ::setrlimit(RLIMIT_CORE, &no_core);
    std::signal(SIGSEGV, SIG_DFL);  // a sanitizer has its own
    std::signal(SIGBUS, SIG_DFL);
    ::alarm(30);
    int code = 99;
    try {
      code = function();
    } catch (...) {
    }
    ::_exit(code);
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child) throw std::runtime_error("waitpid");
  if (WIFSIGNALED(status)) return {-1, WTERMSIG(status)};
  return {WEXITSTATUS(status), 0};
}

}  // namespace penstock::testing
