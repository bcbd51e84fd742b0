// status.h: the calling thread's last error sentence.
#ifndef RFK_CORE_STATUS_H_
#define RFK_CORE_STATUS_H_

namespace rfk {

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void set_error(const char* format, ...);

}  // namespace rfk

#endif  // RFK_CORE_STATUS_H_
