// quantize_emulation_test.cpp: quantization on CUDA through the C ABI, its kernels run on the CPU (emulation/cuda_runtime.h).
//
// Random queries, keys and values (dtypes, head sizes 1 to 256, layouts, valid keys, NaN, infinities, overflow, zeros) against
// plain loops over the formulas, bit for bit, with the threads of a block in ascending and in descending order; and arguments
// that must be refused. Buffers are exactly as large as what belongs into them, for AddressSanitizer.
// Arguments: number of random calls (default 40), first seed (default 1).
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/e4m3.h"
#include "cpu/convert.h"
#include "cuda/cuda_ops.h"
#include "cuda_runtime.h"
#include "rfk/philox.h"
#include "rfk/rfk.h"

namespace {
std::string last_error;
}

namespace rfk {
void set_error(const char* format, ...);
void set_error(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  last_error = text;
}
}  // namespace rfk

namespace {

using rfk::baseline::bfloat16_from_float;
using rfk::baseline::float16_from_float;
using rfk::baseline::float_from_bfloat16;
using rfk::baseline::float_from_float16;

constexpr float kTiny = 0x1p-100f;
const rfk_device kDevice = {RFK_CUDA, 1, nullptr};

struct Dice {
  uint64_t state;
  uint64_t next() {
    state += 0x9E3779B97F4A7C15ull;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int roll(int sides) { return static_cast<int>(next() % static_cast<uint64_t>(sides)); }
  float real() { return static_cast<float>(static_cast<double>(next() >> 11) * 0x1p-53 * 4.0 - 2.0); }
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// e4m3 ---------------------------------------------------------------------------------------------------------------

float e4m3_value(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15u), mantissa = static_cast<int>(code & 7u);
  const float size = exponent ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10)
                              : std::ldexp(static_cast<float>(mantissa), -9);
  return code & 0x80u ? -size : size;
}

// By comparing with the neighbours; the even code on a tie.
uint32_t nearest_e4m3(float value) {
  const double size = std::fabs(static_cast<double>(value));
  uint32_t low = 0, high = 0x7e;
  while (low < high) {  // the largest code not above
    const uint32_t middle = (low + high + 1) / 2;
    if (static_cast<double>(e4m3_value(middle)) <= size) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low < 0x7e) {
    const double below = size - static_cast<double>(e4m3_value(low)), above = static_cast<double>(e4m3_value(low + 1)) - size;
    if (above < below || (above == below && low % 2 == 1)) ++low;
  }
  return low | (std::signbit(value) ? 0x80u : 0u);
}

void check_e4m3() {
  const auto check = [](float value) {
    if (rfk::e4m3_from_float_bits(rfk::bits_from_float(value)) != nearest_e4m3(value)) {
      fail("e4m3 of " + std::to_string(value));
    }
  };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = float_from_bfloat16(static_cast<uint16_t>(bits));
    if (!std::isnan(value)) check(value);
  }
  Dice dice = {11};
  for (int i = 0; i < 200000; ++i) {
    check(std::ldexp(dice.real(), dice.roll(24) - 14));
    const float tie = (e4m3_value(static_cast<uint32_t>(dice.roll(0x7e))) + e4m3_value(static_cast<uint32_t>(dice.roll(0x7e)))) / 2;
    check(tie);
    check(std::nextafter(tie, 1e9f));
    check(std::nextafter(tie, -1e9f));
  }
}

// tensors ------------------------------------------------------------------------------------------------------------

enum Layout { kPlain, kHeadsInside, kChannelGaps, kRowGaps, kShifted, kBackwards, kTransposed, kOneHead, kLayouts };

template <class T>
struct Buffer {  // exactly `count` elements
  explicit Buffer(int64_t count, size_t alignment = 16) : size(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, std::max<size_t>(sizeof(T) * static_cast<size_t>(count), 1)) != 0) fail("memory");
    data.reset(static_cast<T*>(memory));
    std::memset(memory, 0xA5, sizeof(T) * static_cast<size_t>(count));
  }
  T& operator[](int64_t i) { return data.get()[i]; }
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> data;
  int64_t size;
};

// (B, H, S, D) of a floating type.
struct Tensor {
  Tensor(int dtype, int64_t batch, int64_t heads, int64_t rows, int64_t channels, int layout)
      : shape{batch, heads, rows, channels}, bytes(0) {
    int order[4] = {0, 1, 2, 3};  // outermost to innermost
    if (layout == kHeadsInside) std::swap(order[1], order[2]);
    if (layout == kTransposed) std::swap(order[2], order[3]);
    int64_t step = layout == kChannelGaps ? 2 : 1, low = 0, high = 0;
    view.dtype = dtype;
    view.ndim = 4;
    for (int i = 3; i >= 0; --i) {
      const int d = order[i];
      view.shape[d] = shape[d];
      view.strides[d] = layout == kBackwards && d == 2 ? -step : layout == kOneHead && d == 1 ? 0 : step;
      if (!(layout == kOneHead && d == 1)) step *= std::max<int64_t>(shape[d], 1);
      if (layout == kRowGaps && i == 3) step += 8;
      const int64_t reach = (std::max<int64_t>(shape[d], 1) - 1) * view.strides[d];
      (reach < 0 ? low : high) += reach;
    }
    const int64_t shift = layout == kShifted ? 1 : 0;
    const bool empty = batch * heads * rows * channels == 0;
    bytes = Buffer<char>(empty ? 0 : (high - low + 1 + shift) * item());
    view.data = empty ? nullptr : bytes.data.get() + (shift - low) * item();
  }
  int64_t item() const { return view.dtype == RFK_FLOAT32 ? 4 : 2; }
  char* place(int64_t pair, int64_t row, int64_t channel) const {
    return static_cast<char*>(view.data) + (pair / shape[1] * view.strides[0] + pair % shape[1] * view.strides[1] +
                                            row * view.strides[2] + channel * view.strides[3]) * item();
  }
  float get(int64_t pair, int64_t row, int64_t channel) const {
    const char* p = place(pair, row, channel);
    if (view.dtype == RFK_FLOAT32) {
      float value;
      std::memcpy(&value, p, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return view.dtype == RFK_BFLOAT16 ? float_from_bfloat16(bits) : float_from_float16(bits);
  }
  void put(int64_t pair, int64_t row, int64_t channel, float value) {
    char* p = place(pair, row, channel);
    if (view.dtype == RFK_FLOAT32) {
      std::memcpy(p, &value, 4);
      return;
    }
    const uint16_t bits = view.dtype == RFK_BFLOAT16 ? bfloat16_from_float(value) : float16_from_float(value);
    std::memcpy(p, &bits, 2);
  }
  int64_t pairs() const { return shape[0] * shape[1]; }
  void fill(Dice& dice) {
    const int kind = dice.roll(8);
    for (int64_t p = 0; p < pairs(); ++p) {
      for (int64_t j = 0; j < shape[2]; ++j) {
        for (int64_t d = 0; d < shape[3]; ++d) {
          float value = dice.real() + (d % 7 == 3 ? 5.0f : 0.0f);
          if (kind == 0) value = dice.roll(3) ? 0.0f : -0.0f;
          if (kind == 1) value = d % 2 ? 1.25f : -0.75f;  // the same in every row
          if (kind == 2) value = std::ldexp(value, -101);
          if (kind == 3) value = std::ldexp(value, dice.roll(40) - 30);
          if (kind == 4 && d % 3 == 0) value = 0.0f;
          put(p, j, d, value);
        }
      }
    }
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f};
    for (int i = dice.roll(4) ? 0 : 1 + dice.roll(2); i > 0 && pairs() * shape[2] > 0; --i) {
      put(dice.roll(static_cast<int>(pairs())), dice.roll(static_cast<int>(shape[2])), dice.roll(static_cast<int>(shape[3])),
          odd[dice.roll(5)]);
    }
  }

  rfk_tensor view = {};
  int64_t shape[4];
  Buffer<char> bytes;
};

// the formulas -------------------------------------------------------------------------------------------------------

int64_t padded(int64_t channels) {
  int64_t p = 1;
  while (p < channels) p *= 2;
  return p;
}

// The signs from the generator itself, not from the table that the kernels use.
float sign_of(int64_t d) {
  uint32_t w[4] = {static_cast<uint32_t>(d / 128), 0, 0, 0};
  rfk::philox4x32(w[0], w[1], w[2], w[3], 0u, 0u);
  return w[d % 128 / 32] >> (d % 32) & 1u ? -1.0f : 1.0f;
}

std::vector<float> rotated(std::vector<float> x) {
  const int64_t n = padded(static_cast<int64_t>(x.size()));
  for (size_t d = 0; d < x.size(); ++d) x[d] = x[d] * sign_of(static_cast<int64_t>(d));
  x.resize(static_cast<size_t>(n), 0.0f);
  for (int64_t h = 1; h < n; h *= 2) {
    std::vector<float> y(x.size());
    for (int64_t i = 0; i < n; ++i) {
      const bool upper = i / h % 2;
      const float mine = x[static_cast<size_t>(i)], other = x[static_cast<size_t>(upper ? i - h : i + h)];
      y[static_cast<size_t>(i)] = upper ? other - mine : mine + other;
    }
    x.swap(y);
  }
  return x;
}

// The largest magnitude; NaN if one is.
float magnitude(const std::vector<float>& y) {
  float largest = 0.0f;
  for (float value : y) largest = std::isnan(value) || std::isnan(largest) ? NAN : std::max(largest, std::fabs(value));
  return largest;
}

float inverse_of(float largest, float limit) { return largest >= kTiny ? limit / largest : 0.0f; }
float scale_of(float largest, float limit) {
  return !std::isfinite(largest) ? NAN : largest < kTiny ? 0.0f : largest / limit;
}
uint8_t code_of(float value, bool e4m3) {
  if (!std::isfinite(value)) value = 0.0f;
  return static_cast<uint8_t>(e4m3 ? nearest_e4m3(value) : static_cast<uint32_t>(static_cast<int>(std::nearbyint(value))));
}

bool same(float a, float b) { return rfk::bits_from_float(a) == rfk::bits_from_float(b) || (std::isnan(a) && std::isnan(b)); }

void expect(bool good, const std::string& name, const char* what, int64_t at) {
  if (!good) fail(name + ": " + what + " " + std::to_string(at));
}

const int64_t kSizes[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 40, 56, 64, 65, 72, 80, 96, 100, 112, 128, 129, 136, 160, 192, 250, 256};
const int64_t kRows[] = {0, 1, 2, 31, 63, 64, 65, 100, 127, 128, 129, 150, 200, 321};
int64_t pick_size(Dice& dice) { return kSizes[dice.roll(static_cast<int>(std::size(kSizes)))]; }
int64_t pick_rows(Dice& dice, int64_t channels) {
  return kRows[dice.roll(channels > 128 ? 11 : static_cast<int>(std::size(kRows)))];
}
int pick_layout(Dice& dice) { return dice.roll(2) ? kPlain : dice.roll(kLayouts); }

// queries ------------------------------------------------------------------------------------------------------------

void queries(Dice& dice, const std::string& name) {
  const int dtype = (const int[]){RFK_FLOAT32, RFK_BFLOAT16, RFK_FLOAT16}[dice.roll(3)];
  const int32_t scheme = (const int32_t[]){RFK_ATTENTION_INT8_BF16, RFK_ATTENTION_INT8_FP8, RFK_ATTENTION_FP8}[dice.roll(3)];
  const bool e4m3 = scheme == RFK_ATTENTION_FP8;
  const int64_t channels = pick_size(dice);
  Tensor q(dtype, 1 + dice.roll(2), 1 + dice.roll(3), pick_rows(dice, channels), channels, pick_layout(dice));
  q.fill(dice);
  const int64_t pairs = q.pairs(), rows = q.shape[2], width = padded(channels);
  for (int order = 0; order < 2; ++order) {
    emulation::descending = order == 1;
    Buffer<uint8_t> codes(pairs * rows * width), finite(pairs);
    Buffer<float> scale(pairs * rows);
    for (int64_t i = 0; i < pairs; ++i) finite[i] = 1;
    const bool flags = dice.roll(4) != 0;
    const uint64_t before = rfk::cuda::launch_count(RFK_OP_QUANTIZE);
    if (rfk_quantize_queries_cuda(&kDevice, &q.view, scheme, codes.data.get(), scale.data.get(),
                                  flags ? finite.data.get() : nullptr) != RFK_OK) {
      fail(name + ": " + last_error);
    }
    if (rfk::cuda::launch_count(RFK_OP_QUANTIZE) - before != (rows ? 1u : 0u)) fail(name + ": launches");
    for (int64_t p = 0; p < pairs; ++p) {
      bool good = true;
      for (int64_t i = 0; i < rows; ++i) {
        std::vector<float> x;
        for (int64_t d = 0; d < channels; ++d) x.push_back(q.get(p, i, d));
        const std::vector<float> y = rotated(x);
        const float largest = magnitude(y), limit = e4m3 ? 448.0f : 127.0f, inverse = inverse_of(largest, limit);
        good = good && std::isfinite(largest);
        const int64_t at = p * rows + i;
        expect(same(scale[at], scale_of(largest, limit)), name, "scale", at);
        for (int64_t d = 0; d < width; ++d) {
          expect(codes[at * width + d] == code_of(y[static_cast<size_t>(d)] * inverse, e4m3), name, "code", at * width + d);
        }
      }
      expect(!flags || (finite[p] != 0) == good, name, "flag", p);
    }
  }
}

// keys and values ----------------------------------------------------------------------------------------------------

struct Valid {
  Valid(Dice& dice, const Tensor& k) : kind(dice.roll(3)), bytes(k.pairs() * k.shape[2] * 2) {
    view.dtype = RFK_BOOL;
    view.ndim = 3;
    const bool per_head = dice.roll(2);
    const int64_t keys = k.shape[2], gap = 1 + dice.roll(2);
    const int64_t strides[3] = {keys * gap * (per_head ? k.shape[1] : 1), per_head ? keys * gap : 0, gap};
    const int thin = dice.roll(4);  // none valid, a few, most, a run at the start
    for (int64_t i = 0; i < bytes.size; ++i) {
      bytes[i] = thin == 0 ? 0 : thin == 1 ? dice.roll(9) == 0 : thin == 2 ? dice.roll(9) != 0 : i / gap % keys < keys / 3;
    }
    for (int d = 0; d < 3; ++d) {
      view.shape[d] = k.shape[d];
      view.strides[d] = strides[d];
    }
    view.data = keys ? bytes.data.get() : nullptr;
    heads = k.shape[1];
  }
  const rfk_tensor* tensor() const { return kind ? &view : nullptr; }
  bool open(int64_t pair, int64_t key) {
    return !kind || bytes[pair / heads * view.strides[0] + pair % heads * view.strides[1] + key * view.strides[2]] != 0;
  }
  int kind;
  Buffer<uint8_t> bytes;
  rfk_tensor view = {};
  int64_t heads = 1;
};

enum Form { kNoValues, kChecked, kCopied, kCoded };

void keys_values(Dice& dice, const std::string& name) {
  const int dtype = (const int[]){RFK_FLOAT32, RFK_BFLOAT16, RFK_FLOAT16}[dice.roll(3)];
  const int form = dice.roll(2) ? kCoded : dice.roll(3);
  const int32_t scheme = form != kCoded ? RFK_ATTENTION_INT8_BF16 : dice.roll(2) ? RFK_ATTENTION_INT8_FP8 : RFK_ATTENTION_FP8;
  const bool e4m3 = scheme == RFK_ATTENTION_FP8;
  const int64_t channels = pick_size(dice), v_channels = dice.roll(2) ? channels : pick_size(dice);
  const int64_t batch = 1 + dice.roll(2), heads = 1 + dice.roll(2), keys = pick_rows(dice, channels);
  Tensor k(dtype, batch, heads, keys, channels, pick_layout(dice)), v(dtype, batch, heads, keys, v_channels, pick_layout(dice));
  k.fill(dice);
  v.fill(dice);
  Valid valid(dice, k);
  const int64_t pairs = k.pairs(), width = padded(channels), blocks = (keys + 63) / 64, columns = (keys + 127) / 128 * 128;
  const bool flags = dice.roll(4) != 0;
  for (int order = 0; order < 2; ++order) {
    emulation::descending = order == 1;
    Buffer<uint8_t> codes(pairs * keys * width), finite(pairs);
    Buffer<uint8_t> v_codes(form == kCoded ? pairs * v_channels * columns : form == kCopied ? pairs * keys * v_channels * 2 : 0);
    Buffer<float> scale(pairs * blocks), mean(pairs * channels), v_scale(form == kCoded ? pairs * v_channels : 0);
    Buffer<uint8_t> workspace(rfk_quantize_workspace(pairs, keys, channels, form == kCoded ? v_channels : 0), 256);
    const rfk_quantized_heads out = {codes.data.get(),
                                     scale.data.get(),
                                     mean.data.get(),
                                     form >= kCopied ? v_codes.data.get() : nullptr,
                                     v_scale.data.get(),
                                     flags ? finite.data.get() : nullptr};
    const uint64_t before = rfk::cuda::launch_count(RFK_OP_QUANTIZE);
    if (rfk_quantize_keys_cuda(&kDevice, &k.view, form == kNoValues ? nullptr : &v.view, valid.tensor(), scheme, &out,
                               workspace.data.get()) != RFK_OK) {
      fail(name + ": " + last_error);
    }
    if (rfk::cuda::launch_count(RFK_OP_QUANTIZE) - before != (keys ? 3u : 1u)) fail(name + ": launches");
    if (emulation::current_device != 0 || emulation::device_of_last_launch != 1) fail(name + ": device");
    for (int64_t p = 0; p < pairs; ++p) {
      bool good = true;
      std::vector<float> mu;
      for (int64_t d = 0; d < channels; ++d) {
        double total = 0.0;
        int64_t count = 0;
        for (int64_t g = 0; g < blocks; ++g) {
          float sum = 0.0f;
          for (int64_t j = 64 * g; j < std::min(keys, 64 * g + 64); ++j) {
            good = good && std::isfinite(k.get(p, j, d));
            if (!valid.open(p, j)) continue;
            sum = sum + k.get(p, j, d);
            ++count;
          }
          total = total + static_cast<double>(sum);
        }
        mu.push_back(count ? static_cast<float>(total / static_cast<double>(count)) : 0.0f);
        good = good && std::isfinite(mu.back());
        expect(same(mean[p * channels + d], mu.back()), name, "mean", p * channels + d);
      }
      for (int64_t g = 0; g < blocks; ++g) {
        std::vector<std::vector<float>> rows;
        std::vector<float> all;
        for (int64_t j = 64 * g; j < std::min(keys, 64 * g + 64); ++j) {
          std::vector<float> x;
          for (int64_t d = 0; d < channels; ++d) x.push_back(k.get(p, j, d) - mu[static_cast<size_t>(d)]);
          rows.push_back(valid.open(p, j) ? rotated(x) : std::vector<float>(static_cast<size_t>(width), 0.0f));
          all.insert(all.end(), rows.back().begin(), rows.back().end());
        }
        const float largest = magnitude(all), limit = e4m3 ? 448.0f : 127.0f, inverse = inverse_of(largest, limit);
        good = good && std::isfinite(largest);
        expect(same(scale[p * blocks + g], scale_of(largest, limit)), name, "key scale", p * blocks + g);
        for (size_t j = 0; j < rows.size(); ++j) {
          for (int64_t d = 0; d < width; ++d) {
            const int64_t at = (p * keys + 64 * g + static_cast<int64_t>(j)) * width + d;
            expect(codes[at] == code_of(rows[j][static_cast<size_t>(d)] * inverse, e4m3), name, "key code", at);
          }
        }
      }
      for (int64_t d = 0; d < v_channels && form != kNoValues; ++d) {
        std::vector<float> column;
        for (int64_t j = 0; j < keys; ++j) {
          column.push_back(valid.open(p, j) || form != kCoded ? v.get(p, j, d) : 0.0f);
          const uint16_t narrow = bfloat16_from_float(v.get(p, j, d));
          good = good && std::isfinite(form == kCoded ? v.get(p, j, d) : float_from_bfloat16(narrow));
          if (form != kCopied) continue;
          uint16_t got;
          std::memcpy(&got, v_codes.data.get() + ((p * keys + j) * v_channels + d) * 2, 2);
          expect(same(float_from_bfloat16(got), float_from_bfloat16(narrow)), name, "value", (p * keys + j) * v_channels + d);
        }
        if (form != kCoded) continue;
        const float largest = magnitude(column), inverse = inverse_of(largest, 448.0f);
        expect(same(v_scale[p * v_channels + d], std::isfinite(largest) ? largest / 448.0f : NAN), name, "value scale", d);
        for (int64_t j = 0; j < columns; ++j) {
          const uint8_t code = j < keys ? code_of(column[static_cast<size_t>(j)] * inverse, true) : uint8_t{0};
          expect(v_codes[(p * v_channels + d) * columns + j] == code, name, "value code", (p * v_channels + d) * columns + j);
        }
      }
      expect(!flags || (finite[p] == 1) == good, name, "flag", p);
      expect(!flags || finite[p] <= 1, name, "flag byte", p);
    }
  }
}

// refusals -----------------------------------------------------------------------------------------------------------

void refused(rfk_status status, const char* words) {
  if (status != RFK_INVALID || last_error.find(words) == std::string::npos) fail("expected '" + std::string(words) + "': " + last_error);
  last_error.clear();
}

void check_refusals() {
  Tensor q(RFK_BFLOAT16, 1, 2, 5, 16, kPlain), v(RFK_BFLOAT16, 1, 2, 5, 8, kPlain), single(RFK_FLOAT32, 1, 2, 5, 8, kPlain);
  Tensor wide(RFK_BFLOAT16, 1, 2, 5, 257, kPlain), longer(RFK_BFLOAT16, 1, 2, 6, 8, kPlain);
  Buffer<uint8_t> codes(4096), values(4096), workspace(1 << 16, 256);
  Buffer<float> scale(64), mean(64), v_scale(64);
  const rfk_device cpu = {RFK_CPU, 0, nullptr}, absent = {RFK_CUDA, 7, nullptr};
  const int32_t s = RFK_ATTENTION_INT8_FP8;
  uint8_t* const c = codes.data.get();
  float* const f = scale.data.get();
  refused(rfk_quantize_queries_cuda(&cpu, &q.view, s, c, f, nullptr), "run on CUDA");
  refused(rfk_quantize_queries_cuda(nullptr, &q.view, s, c, f, nullptr), "run on CUDA");
  refused(rfk_quantize_queries_cuda(&kDevice, nullptr, s, c, f, nullptr), "q must have 4 dimensions");
  refused(rfk_quantize_queries_cuda(&kDevice, &q.view, RFK_ATTENTION_INT8_U8, c, f, nullptr), "scheme 0");
  refused(rfk_quantize_queries_cuda(&kDevice, &q.view, RFK_ATTENTION_BF16, c, f, nullptr), "scheme 2");
  refused(rfk_quantize_queries_cuda(&kDevice, &wide.view, s, c, f, nullptr), "257");
  refused(rfk_quantize_queries_cuda(&kDevice, &q.view, s, nullptr, f, nullptr), "codes is missing");
  refused(rfk_quantize_queries_cuda(&kDevice, &q.view, s, c + 4, f, nullptr), "aligned to 8");
  refused(rfk_quantize_queries_cuda(&kDevice, &q.view, s, c, nullptr, nullptr), "scale is missing");
  rfk_tensor changed = q.view;
  changed.dtype = RFK_FLOAT64;
  refused(rfk_quantize_queries_cuda(&kDevice, &changed, s, c, f, nullptr), "float64");
  changed.dtype = RFK_BOOL;
  refused(rfk_quantize_queries_cuda(&kDevice, &changed, s, c, f, nullptr), "dtype 4");
  changed = q.view;
  changed.shape[2] = -1;
  refused(rfk_quantize_queries_cuda(&kDevice, &changed, s, c, f, nullptr), "negative size");
  changed = q.view;
  changed.data = nullptr;
  refused(rfk_quantize_queries_cuda(&kDevice, &changed, s, c, f, nullptr), "no memory");
  if (rfk_quantize_queries_cuda(&absent, &q.view, s, c, f, nullptr) != RFK_CUDA_ERROR) fail("an absent device must be an error");

  const rfk_quantized_heads good = {c, f, mean.data.get(), values.data.get(), v_scale.data.get(), nullptr};
  uint8_t* const w = workspace.data.get();
  refused(rfk_quantize_keys_cuda(&cpu, &q.view, &v.view, nullptr, s, &good, w), "run on CUDA");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, nullptr, nullptr, s, &good, w), "v is missing");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &longer.view, nullptr, s, &good, w), "same batch, heads and keys");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &single.view, nullptr, s, &good, w), "one dtype");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &wide.view, nullptr, s, &good, w), "257");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, nullptr, s, nullptr, w), "outputs are missing");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, nullptr, s, &good, nullptr), "workspace is missing");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, nullptr, s, &good, w + 16), "aligned to 256");
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, &q.view, s, &good, w), "valid must have 3 dimensions");
  rfk_tensor valid = {c, RFK_BOOL, 3, {1, 2, 6}, {12, 6, 1}};
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, &valid, s, &good, w), "valid must be bool");
  valid.shape[2] = 5;
  valid.dtype = RFK_FLOAT32;
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, &valid, s, &good, w), "valid must be bool");
  rfk_quantized_heads bad = good;
  bad.mean = nullptr;
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, nullptr, s, &bad, w), "mean is missing");
  bad = good;
  bad.value_codes = values.data.get() + 8;
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, nullptr, s, &bad, w), "value_codes must be aligned to 16");
  bad = good;
  bad.value_scale = nullptr;
  refused(rfk_quantize_keys_cuda(&kDevice, &q.view, &v.view, nullptr, s, &bad, w), "value_scale is missing");
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 40;
  const int first = argc > 2 ? std::atoi(argv[2]) : 1;
  check_e4m3();
  check_refusals();
  for (int seed = first; seed < first + calls; ++seed) {
    Dice dice = {static_cast<uint64_t>(seed)};
    queries(dice, "queries, seed " + std::to_string(seed));
    keys_values(dice, "keys and values, seed " + std::to_string(seed));
  }
  std::printf("quantize: %d calls\n", calls);
  return 0;
}
