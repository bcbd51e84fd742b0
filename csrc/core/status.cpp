// status.cpp: see status.h.
#include "core/status.h"

#include <cstdarg>
#include <cstdio>

#include "rfk/rfk.h"

namespace rfk {
namespace {
thread_local char last_error[512] = "";
}

void set_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
}

}  // namespace rfk

extern "C" const char* rfk_last_error(void) { return rfk::last_error; }
