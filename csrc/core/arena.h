// arena.h: scratch memory of a thread, reused from call to call: fresh pages cost a tenth of a short call.
#ifndef RFK_CORE_ARENA_H_
#define RFK_CORE_ARENA_H_

#include <cstdint>

namespace rfk {

class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // At least so many bytes, 64-byte aligned, valid until the next call; NULL when there are none.
  char* take(int64_t bytes);
  // Gives a block of more than 64 MiB back.
  void trim();

 private:
  char* block_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace rfk

#endif  // RFK_CORE_ARENA_H_
