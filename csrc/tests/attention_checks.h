// attention_checks.h: what the tests of quantize and attention share: levels, head tensors, the rotation as loops.
#ifndef RFK_TESTS_ATTENTION_CHECKS_H_
#define RFK_TESTS_ATTENTION_CHECKS_H_

#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "core/attention_layout.h"
#include "rfk/philox.h"

namespace rfk_test {

// Runs `call` once per set of attention kernels that this CPU can run.
template <class Call>
void at_attention_levels(rfk_op op, const Call& call) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};
  int32_t last = -1;
  for (int32_t isa = RFK_ISA_BASELINE; isa < RFK_ISA_COUNT; ++isa) {
    if (isa > rfk_isa_detected() || !rfk_isa_compiled(isa)) continue;
    CHECK(rfk_isa_cap(isa) == RFK_OK, "%s", rfk_last_error());
    const int32_t level = rfk_attention_isa();
    CHECK(level <= isa, "level %d under a cap of %d", level, isa);
    if (level == last) continue;
    last = level;
    const uint64_t before = rfk_launch_count(op, level);
    call(kNames[level]);
    CHECK(rfk_launch_count(op, level) > before, "op %d was not counted at %s", op, kNames[level]);
  }
  rfk_isa_cap(RFK_ISA_COUNT - 1);
}

// Memory with a fence on either side, which must stay as it was.
template <class T>
class Fenced {
 public:
  explicit Fenced(int64_t count) : count_(count), bytes_(static_cast<size_t>(count) * sizeof(T) + 3 * kFence, kPattern) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(bytes_.data()) + kFence;
    begin_ = kFence + static_cast<size_t>(-address & (kFence - 1));
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data() + begin_); }
  T operator[](int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + begin_ + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    return value;
  }
  int64_t size() const { return count_; }
  bool intact() const {
    const size_t end = begin_ + static_cast<size_t>(count_) * sizeof(T);
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if ((i < begin_ || i >= end) && bytes_[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kFence = 64;
  static constexpr char kPattern = 0x5a;
  int64_t count_;
  std::vector<char> bytes_;
  size_t begin_;
};

inline int64_t some_channels(Dice& dice) {
  static const int64_t sizes[] = {1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 72, 80, 96, 100, 127, 128, 129, 160, 192, 255, 256};
  return sizes[dice.roll(static_cast<int>(sizeof sizes / sizeof *sizes))];
}

inline int64_t some_keys(Dice& dice) {
  static const int64_t sizes[] = {1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 191, 255, 256, 257, 300, 513};
  return sizes[dice.roll(static_cast<int>(sizeof sizes / sizeof *sizes))];
}

// About normal numbers; a common offset on some channels, as keys have.
inline void fill_heads(Dice& dice, Tensor& t, bool offset) {
  const int64_t channels = t.view()->shape[3];
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double value = (dice.real() + dice.real() + dice.real()) / 4.0;
    t.set(i, value + (offset && i % channels % 5 == 2 ? 3.0 : 0.0));
  }
}

// One row of a (B, H, S, D) tensor as float32.
inline std::vector<float> row_of(const Tensor& t, int64_t pair, int64_t row) {
  const int64_t rows = t.view()->shape[2], channels = t.view()->shape[3];
  std::vector<float> x;
  for (int64_t d = 0; d < channels; ++d) x.push_back(static_cast<float>(t.get((pair * rows + row) * channels + d)));
  return x;
}

// The fixed signs, then the Hadamard transform of the row padded to a power of two, spans 1, 2, 4, ...
inline std::vector<float> rotated(std::vector<float> x) {
  for (size_t d = 0; d < x.size(); ++d) {
    const uint32_t counter[4] = {static_cast<uint32_t>(d / 128), 0, 0, 0}, key[2] = {0, 0};
    uint32_t words[4];
    rfk_philox4x32(counter, key, words);
    if (words[d % 128 / 32] >> (d % 32) & 1u) x[d] = -x[d];
  }
  size_t size = 1;
  while (size < x.size()) size *= 2;
  x.resize(size, 0.0f);
  for (size_t span = 1; span < size; span *= 2) {
    for (size_t i = 0; i < size; ++i) {
      if (i & span) continue;
      const float a = x[i], b = x[i + span];
      x[i] = a + b;
      x[i + span] = a - b;
    }
  }
  return x;
}

inline float largest_magnitude(const std::vector<float>& x) {
  float largest = 0.0f;
  for (float value : x) largest = std::fabs(value) > largest ? std::fabs(value) : largest;
  return largest;
}

inline void refused(rfk_status status, const char* words) {
  CHECK(status == RFK_INVALID, "status %d, expected a refusal with '%s'", status, words);
  CHECK(std::strstr(rfk_last_error(), words) != nullptr, "'%s' does not say '%s'", rfk_last_error(), words);
}

}  // namespace rfk_test

#endif  // RFK_TESTS_ATTENTION_CHECKS_H_
