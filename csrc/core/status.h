// status.h: the calling thread's last error sentence, and the launch counters.
#ifndef RFK_CORE_STATUS_H_
#define RFK_CORE_STATUS_H_

#include "rfk/rfk.h"

namespace rfk {

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void set_error(const char* format, ...);

void count_launch(rfk_op op, int32_t isa);  // core/dispatch.cpp

}  // namespace rfk

#endif  // RFK_CORE_STATUS_H_
