// checks.h: what the tests of the C ABI share: a check macro, dice, tensors of every layout, and number formats written
// a second time, from their definition.
//
// A tensor's memory begins and ends where its elements do, so AddressSanitizer sees an access outside; the bytes between
// the elements hold a pattern that must survive.
#ifndef RFK_TESTS_CHECKS_H_
#define RFK_TESTS_CHECKS_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "rfk/philox.h"
#include "rfk/rfk.h"

#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                 \
      std::fputc('\n', stderr);                                          \
      std::exit(1);                                                      \
    }                                                                    \
  } while (false)

namespace rfk_test {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};
constexpr rfk_device kCpuDevice = {RFK_CPU, 0, nullptr};

// A small generator of its own, so that a failing call can be repeated from its seed.
struct Dice {
  uint64_t state;
  uint64_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (state ^ (state >> 29)) * 0xBF58476D1CE4E5B9ull >> 11;
  }
  int roll(int sides) { return static_cast<int>(next() % static_cast<uint64_t>(sides)); }
  double real() { return static_cast<double>(next() % 2000001) * 1e-6 * 4.0 - 4.0; }
};

inline int item_size(int dtype) { return dtype == RFK_FLOAT64 ? 8 : dtype == RFK_FLOAT32 ? 4 : 2; }

// Nearest value of a format with `digits` significant bits and quantum 2^least, ties to even.
inline double nearest(double value, int digits, int least, double largest) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int quantum = exponent - digits > least ? exponent - digits : least;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -quantum)), quantum);
  return std::fabs(rounded) > largest ? std::copysign(INFINITY, value) : rounded;
}

// The value a dtype stores for `value`; the half types are reached through float.
inline double stored(int dtype, double value) {
  if (dtype == RFK_FLOAT64) return value;
  const double single = static_cast<double>(static_cast<float>(value));
  if (dtype == RFK_FLOAT32) return single;
  return dtype == RFK_BFLOAT16 ? nearest(single, 8, -133, 0x1.FEp127) : nearest(single, 11, -24, 65504.0);
}

inline double read_value(int dtype, const char* place) {
  if (dtype == RFK_FLOAT64) {
    double value;
    std::memcpy(&value, place, 8);
    return value;
  }
  if (dtype == RFK_FLOAT32) {
    float value;
    std::memcpy(&value, place, 4);
    return static_cast<double>(value);
  }
  uint16_t bits;
  std::memcpy(&bits, place, 2);
  const int mantissa_bits = dtype == RFK_BFLOAT16 ? 7 : 10, bias = dtype == RFK_BFLOAT16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 2 * bias + 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// Writes a value that the dtype holds exactly.
inline void write_value(int dtype, char* place, double value) {
  if (dtype == RFK_FLOAT64) {
    std::memcpy(place, &value, 8);
  } else if (dtype == RFK_FLOAT32) {
    const float single = static_cast<float>(value);
    std::memcpy(place, &single, 4);
  } else {
    const int mantissa_bits = dtype == RFK_BFLOAT16 ? 7 : 10, bias = dtype == RFK_BFLOAT16 ? 127 : 15;
    int exponent, bits;
    const double size = std::fabs(value);
    std::frexp(size, &exponent);
    if (std::isnan(value)) {
      bits = (2 * bias + 1) << mantissa_bits | 1 << (mantissa_bits - 1);
    } else if (std::isinf(value)) {
      bits = (2 * bias + 1) << mantissa_bits;
    } else if (size < std::ldexp(1.0, 1 - bias)) {
      bits = static_cast<int>(std::ldexp(size, bias + mantissa_bits - 1));
    } else {
      bits = ((exponent - 2 + bias) << mantissa_bits) + static_cast<int>(std::ldexp(size, mantissa_bits + 1 - exponent));
    }
    const uint16_t half = static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
    std::memcpy(place, &half, 2);
  }
}

enum Layout { kDense, kReversed, kGaps, kBackwards, kBroadcast, kLayouts };
constexpr int kOutputLayouts = kBroadcast;  // a broadcast tensor cannot be written

// A tensor in memory of its own.
class Tensor {
 public:
  Tensor(int dtype, const std::vector<int64_t>& shape, int layout) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int32_t>(shape.size());
    int64_t step = layout == kGaps ? 3 : 1, low = 0, high = 0;
    numel_ = 1;
    for (int k = 0; k < view_.ndim; ++k) {
      const int d = layout == kReversed ? k : view_.ndim - 1 - k;
      view_.shape[d] = shape[static_cast<size_t>(d)];
      view_.strides[d] = layout == kBroadcast && d == 0 ? 0 : layout == kBackwards && d % 2 == 0 ? -step : step;
      if (view_.shape[d] > 0) (view_.strides[d] < 0 ? low : high) += (view_.shape[d] - 1) * view_.strides[d];
      if (!(layout == kBroadcast && d == 0)) step *= view_.shape[d] > 0 ? view_.shape[d] : 1;
      numel_ *= view_.shape[d];
    }
    const int64_t elements = numel_ > 0 ? high - low + 1 : 0;
    memory_.assign(static_cast<size_t>(elements * item()), static_cast<char>(kPattern));
    view_.data = numel_ > 0 ? memory_.data() - low * item() : nullptr;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const rfk_tensor* view() const { return &view_; }
  int dtype() const { return view_.dtype; }
  int64_t numel() const { return numel_; }
  int64_t batch() const { return view_.ndim > 0 ? view_.shape[0] : 1; }
  int64_t per_sample() const { return batch() > 0 ? numel_ / batch() : 0; }

  char* place(int64_t index) const {
    int64_t offset = 0;
    for (int d = view_.ndim - 1; d >= 0; --d) {
      offset += index % view_.shape[d] * view_.strides[d];
      index /= view_.shape[d];
    }
    return static_cast<char*>(view_.data) + offset * item();
  }
  double get(int64_t index) const { return read_value(view_.dtype, place(index)); }
  void set(int64_t index, double value) { write_value(view_.dtype, place(index), stored(view_.dtype, value)); }

  // Numbers in [-4, 4], now and then something special.
  void fill(Dice& dice, bool special) {
    const double odd[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-40, 6e-8, 65504.0, 3e38, -3e38};
    for (int64_t i = 0; i < numel_; ++i) set(i, special && dice.roll(4) == 0 ? odd[dice.roll(10)] : dice.real());
  }
  // Every byte that belongs to no element still holds the pattern.
  bool gaps_untouched() const {
    std::vector<char> covered(memory_.size(), 0);
    for (int64_t i = 0; i < numel_; ++i) std::memset(&covered[static_cast<size_t>(place(i) - memory_.data())], 1, static_cast<size_t>(item()));
    for (size_t b = 0; b < memory_.size(); ++b) {
      if (!covered[b] && memory_[b] != static_cast<char>(kPattern)) return false;
    }
    return true;
  }
  const std::vector<char>& memory() const { return memory_; }

 private:
  static constexpr int kPattern = 0xA5;
  int64_t item() const { return item_size(view_.dtype); }

  rfk_tensor view_{};
  int64_t numel_ = 0;
  std::vector<char> memory_;
};

inline bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// A scalar for the call, 0-d, or one a sample with a stride, in a dtype of its own.
class Scalar {
 public:
  Scalar(Dice& dice, int64_t batch) : kind_(dice.roll(3)), dtype_(dice.roll(4)), stride_(1 + dice.roll(3)) {
    const int64_t count = kind_ == 2 ? (batch > 0 ? (batch - 1) * stride_ + 1 : 0) : 1;
    memory_.resize(static_cast<size_t>(count * item_size(dtype_)));
    for (int64_t i = 0; i < count; ++i) {
      write_value(dtype_, memory_.data() + i * item_size(dtype_), stored(dtype_, dice.real() * 0.5));
    }
    number_ = dice.real();
    view = {number_, kind_ == 0 ? nullptr : memory_.data(), kind_ == 2 ? stride_ : 0, dtype_};
    if (kind_ != 0 && memory_.empty()) view = {0.0, nullptr, 0, dtype_};
  }
  // Its value for a sample, in the compute type.
  template <class C>
  C at(int64_t sample) const {
    if (view.data == nullptr) return static_cast<C>(view.value);
    return static_cast<C>(read_value(dtype_, memory_.data() + sample * view.stride * item_size(dtype_)));
  }
  rfk_scalar view;

 private:
  int kind_, dtype_;
  int64_t stride_;
  double number_;
  std::vector<char> memory_;
};

// A seed and an offset: numbers, 0-d, or one a sample.
class Noise {
 public:
  Noise(Dice& dice, int64_t batch) {
    view.present = 1;
    const uint64_t values[] = {0, 1, 0xFFFFFFFFull, 1ull << 32, (1ull << 63) - 1, (1ull << 40) + 12345};
    view.seed = values[dice.roll(6)];
    view.offset = values[dice.roll(6)];
    const int kind = dice.roll(3);
    if (kind == 0 || batch == 0) return;
    view.per_sample = kind == 2;
    const int64_t stride = kind == 2 ? 1 + dice.roll(2) : 0;
    for (int64_t i = 0; i < (kind == 2 ? (batch - 1) * stride + 1 : 1); ++i) {
      seeds_.push_back(static_cast<int64_t>(values[dice.roll(6)]));
      offsets_.push_back(static_cast<int64_t>(values[dice.roll(6)]));
    }
    view.seed_data = seeds_.data();
    view.seed_stride = stride;
    if (dice.roll(2) == 0) return;
    view.offset_data = offsets_.data();
    view.offset_stride = stride;
  }
  // The four words that the element's counter gives, by the definition in rfk.h.
  void words(int64_t index, int64_t per_sample, uint32_t out[4]) const {
    const int64_t sample = per_sample > 0 ? index / per_sample : 0;
    const uint64_t seed = view.seed_data ? static_cast<uint64_t>(view.seed_data[sample * view.seed_stride]) : view.seed;
    const uint64_t offset =
        view.offset_data ? static_cast<uint64_t>(view.offset_data[sample * view.offset_stride]) : view.offset;
    const uint64_t quad = static_cast<uint64_t>(view.per_sample ? index % per_sample : index) / 4;
    const uint32_t counter[4] = {static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32),
                                 static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
    const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    rfk_philox4x32(counter, key, out);
  }
  int lane(int64_t index, int64_t per_sample) const {
    return static_cast<int>((view.per_sample ? index % per_sample : index) % 4);
  }
  float normal(int64_t index, int64_t per_sample) const {
    uint32_t w[4];
    words(index, per_sample, w);
    float z[4];
    rfk::normals_from_words(w[0], w[1], w[2], w[3], z[0], z[1], z[2], z[3]);
    return z[lane(index, per_sample)];
  }
  rfk_noise view{};

 private:
  std::vector<int64_t> seeds_, offsets_;
};

// Runs `call` at every level of this CPU and checks that it succeeded and was counted.
template <class Call>
void at_every_level(rfk_op op, const Call& call) {
  for (int32_t isa = RFK_ISA_BASELINE; isa <= RFK_ISA_AVX512; ++isa) {
    if (isa > rfk_isa_detected() || !rfk_isa_compiled(isa)) continue;
    CHECK(rfk_isa_cap(isa) == RFK_OK && rfk_isa_used() == isa, "level %s", kIsaNames[isa]);
    const uint64_t before = rfk_launch_count(op, isa);
    call(kIsaNames[isa]);
    CHECK(rfk_launch_count(op, isa) > before, "op %d was not counted at %s", op, kIsaNames[isa]);
  }
  rfk_isa_cap(RFK_ISA_COUNT - 1);
}

inline std::vector<int64_t> some_shape(Dice& dice) {
  static const std::vector<std::vector<int64_t>> shapes = {
      {},  {1}, {5}, {3, 7}, {2, 3, 5, 7}, {3, 1031}, {1, 2049}, {70, 3}, {2, 1, 3, 1}, {0, 3}, {3, 0}, {40, 2, 13}, {2, 33, 31},
      {1, 1, 1}, {2, 40000}};
  return shapes[static_cast<size_t>(dice.roll(static_cast<int>(shapes.size())))];
}

// The number of random calls, from the command line.
inline int rounds(int argc, char** argv) { return argc > 1 ? std::atoi(argv[1]) : 120; }

}  // namespace rfk_test

#endif  // RFK_TESTS_CHECKS_H_
