// quantize_test.cpp: quantized queries, keys and values of every level against loops over the formulas; refused arguments.
#include "attention_checks.h"

using namespace rfk_test;

namespace {

constexpr float kTiny = 0x1p-100f;
constexpr int kTypes[] = {RFK_FLOAT32, RFK_BFLOAT16, RFK_FLOAT16, RFK_FLOAT64};

int code_of(float value, float factor) { return static_cast<int>(std::nearbyint(value * factor)); }

void queries(Dice& dice) {
  const int64_t shape[4] = {1 + dice.roll(2), 1 + dice.roll(2), dice.roll(3) ? some_keys(dice) % 71 : dice.roll(3), some_channels(dice)};
  Tensor q(kTypes[dice.roll(4)], {shape[0], shape[1], shape[2], shape[3]}, dice.roll(kLayouts));
  fill_heads(dice, q, false);
  const int64_t pairs = shape[0] * shape[1], rows = shape[2], width = rfk::next_power_of_two(shape[3]);
  const int64_t poisoned = dice.roll(3) == 0 && q.numel() > 0 ? dice.roll(static_cast<int>(q.numel())) : -1;
  if (poisoned >= 0) q.set(poisoned, dice.roll(2) ? NAN : -INFINITY);
  if (poisoned < 0 && rows > 1) {
    for (int64_t d = 0; d < shape[3]; ++d) q.set(d, 0.0);
  }
  if (pairs * rows == 0) {
    CHECK(rfk_quantize_queries(&kCpuDevice, q.view(), 0, nullptr, nullptr, nullptr) == RFK_OK, "%s", rfk_last_error());
    return;
  }
  at_attention_levels(RFK_OP_QUANTIZE, [&](const char* level) {
    Fenced<int8_t> codes(pairs * rows * width);
    Fenced<float> scale(pairs * rows);
    Fenced<uint8_t> finite(pairs);
    std::memset(finite.data(), 1, static_cast<size_t>(pairs));
    CHECK(rfk_quantize_queries(&kCpuDevice, q.view(), dice.roll(2), codes.data(), scale.data(), finite.data()) == RFK_OK, "%s",
          rfk_last_error());
    CHECK(codes.intact() && scale.intact() && finite.intact(), "a write outside, %s", level);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      bool good = true;
      for (int64_t i = 0; i < rows; ++i) {
        const std::vector<float> x = row_of(q, pair, i), y = rotated(x);
        bool clean = true;
        for (float value : x) clean = clean && std::isfinite(value);
        good = good && clean;
        if (!clean) continue;
        const float top = largest_magnitude(y), factor = top < kTiny ? 0.0f : 127.0f / top;
        const int64_t at = pair * rows + i;
        CHECK(scale[at] == (top < kTiny ? 0.0f : top / 127.0f), "scale of row %lld, %s", static_cast<long long>(at), level);
        for (int64_t d = 0; d < width; ++d) {
          CHECK(codes[at * width + d] == code_of(y[static_cast<size_t>(d)], factor), "row %lld, channel %lld, %s",
                static_cast<long long>(at), static_cast<long long>(d), level);
        }
      }
      CHECK((finite[pair] != 0) == good, "flag, %s", level);
    }
  });
}

// One head's packed keys and values, part by part.
struct Packed {
  const char* data;
  rfk::AttentionLayout l;
  template <class T>
  T part(int64_t at, int64_t index) const {
    T value;
    std::memcpy(&value, data + at + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  template <class T>
  T key(int64_t j, int64_t d) const {
    const int64_t wide = 64 / static_cast<int64_t>(sizeof(T));
    return part<T>(l.keys_at, ((j / 16 * (l.padded_channels / wide) + d / wide) * 16 + j % 16) * wide + d % wide);
  }
  template <class T>
  T value(int64_t j, int64_t d) const {
    const int64_t deep = 64 / static_cast<int64_t>(sizeof(T));
    return part<T>(l.values_at, ((j / deep * (l.padded_value_channels / 16) + d / 16) * 16 + d % 16) * deep + j % deep);
  }
};

double bfloat16_value(uint16_t bits) { return read_value(RFK_BFLOAT16, reinterpret_cast<const char*>(&bits)); }

void check_keys(const Packed& p, const Tensor& k, int64_t pair, const std::vector<uint8_t>& open, const char* level) {
  const int64_t keys = p.l.keys, channels = p.l.channels;
  if (!p.l.int8_keys()) {
    for (int64_t j = 0; j < p.l.padded_keys; ++j) {
      for (int64_t d = 0; d < p.l.padded_channels; ++d) {
        const bool inside = j < keys && d < channels;
        const double want = inside ? stored(RFK_BFLOAT16, k.get((pair * keys + j) * channels + d)) : 0.0;
        CHECK(bfloat16_value(p.key<uint16_t>(j, d)) == want, "bfloat16 key, %s", level);
      }
    }
    return;
  }
  std::vector<float> mean;
  for (int64_t d = 0; d < channels; ++d) {
    double total = 0.0, count = 0.0;
    for (int64_t begin = 0; begin < keys; begin += 64) {
      float sum = 0.0f;
      for (int64_t j = begin; j < keys && j < begin + 64; ++j) {
        if (!open[static_cast<size_t>(j)]) continue;
        sum += static_cast<float>(k.get((pair * keys + j) * channels + d));
        count += 1.0;
      }
      total += static_cast<double>(sum);
    }
    mean.push_back(count > 0.0 ? static_cast<float>(total / count) : 0.0f);
    CHECK(p.part<float>(p.l.mean_at, d) == mean.back(), "mean %lld, %s", static_cast<long long>(d), level);
  }
  for (int64_t begin = 0; begin < p.l.padded_keys; begin += 64) {
    std::vector<std::vector<float>> rows;
    float top = 0.0f;
    for (int64_t j = begin; j < begin + 64; ++j) {
      std::vector<float> y(static_cast<size_t>(p.l.rotated), 0.0f);
      if (j < keys && open[static_cast<size_t>(j)]) {
        std::vector<float> x = row_of(k, pair, j);
        for (size_t d = 0; d < x.size(); ++d) x[d] = x[d] - mean[d];
        y = rotated(x);
      }
      top = std::max(top, largest_magnitude(y));
      rows.push_back(y);
    }
    const float factor = top < kTiny ? 0.0f : 127.0f / top;
    CHECK(p.part<float>(p.l.key_scale_at, begin / 64) == (top < kTiny ? 0.0f : top / 127.0f), "key scale, %s", level);
    for (int64_t j = begin; j < begin + 64; ++j) {
      for (int64_t d = 0; d < p.l.padded_channels; ++d) {
        const int want = d < p.l.rotated ? code_of(rows[static_cast<size_t>(j - begin)][static_cast<size_t>(d)], factor) : 0;
        CHECK(p.key<int8_t>(j, d) == want, "key %lld, channel %lld, %s", static_cast<long long>(j), static_cast<long long>(d), level);
      }
    }
  }
}

void check_values(const Packed& p, const Tensor& v, int64_t pair, const std::vector<uint8_t>& open, const char* level) {
  const int64_t keys = p.l.keys, channels = p.l.value_channels;
  const auto value = [&](int64_t j, int64_t d) { return static_cast<float>(v.get((pair * keys + j) * channels + d)); };
  std::vector<float> top(static_cast<size_t>(channels), 0.0f);
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t d = 0; d < channels && open[static_cast<size_t>(j)]; ++d) {
      top[static_cast<size_t>(d)] = std::max(top[static_cast<size_t>(d)], std::fabs(value(j, d)));
    }
  }
  for (int64_t j = 0; j < p.l.padded_keys; ++j) {
    const bool counts = j < keys && open[static_cast<size_t>(j)];
    float s = 1.0f;
    std::vector<float> w(static_cast<size_t>(channels), 0.0f);
    if (counts && p.l.int8_values()) {
      for (int64_t d = 0; d < channels; ++d) {
        const float c = top[static_cast<size_t>(d)];
        w[static_cast<size_t>(d)] = value(j, d) * (c < kTiny ? 0.0f : 1.0f / c);
      }
      s = std::max(largest_magnitude(w), 0x1p-40f);
    }
    const float addend = p.part<float>(p.l.addend_at, j);
    CHECK(j < keys ? std::fabs(addend - std::log2(s)) <= 1e-5f : addend == -INFINITY, "addend %lld, %s", static_cast<long long>(j), level);
    for (int64_t d = 0; d < p.l.padded_value_channels; ++d) {
      if (p.l.int8_values()) {
        const int want = d < channels ? code_of(w[static_cast<size_t>(d)], 127.0f / s) : 0;
        CHECK(p.value<int8_t>(j, d) == want, "value %lld, channel %lld, %s", static_cast<long long>(j), static_cast<long long>(d), level);
      } else {
        const double want = j < keys && d < channels ? stored(RFK_BFLOAT16, static_cast<double>(value(j, d))) : 0.0;
        CHECK(bfloat16_value(p.value<uint16_t>(j, d)) == want, "bfloat16 value, %s", level);
      }
    }
  }
}

void keys_values(Dice& dice) {
  const int dtype = kTypes[dice.roll(4)], scheme = dice.roll(3);
  const int64_t batch = 1 + dice.roll(2), heads = 1 + dice.roll(2), keys = dice.roll(12) ? some_keys(dice) : 0;
  const int64_t channels = some_channels(dice), value_channels = dice.roll(2) ? channels : some_channels(dice), pairs = batch * heads;
  Tensor k(dtype, {batch, heads, keys, channels}, dice.roll(kLayouts)), v(dtype, {batch, heads, keys, value_channels}, dice.roll(kLayouts));
  fill_heads(dice, k, true);
  fill_heads(dice, v, false);
  const int64_t poisoned = dice.roll(5) == 0 && k.numel() > 0 ? dice.roll(static_cast<int>(pairs)) : -1;
  Tensor& spoilt = dice.roll(2) ? k : v;
  if (poisoned >= 0) spoilt.set(spoilt.numel() / pairs * poisoned, NAN);
  const int masked = dice.roll(4);  // 0: none, 1: some, 2: most, 3: all
  std::vector<uint8_t> valid(static_cast<size_t>(pairs * keys), 1);
  for (uint8_t& byte : valid) byte = masked == 0 || (masked == 1 ? dice.roll(4) != 0 : masked == 2 && dice.roll(6) == 0);
  int64_t offsets[9];
  const int64_t bytes = rfk_quantized_bytes(scheme, keys, channels, value_channels, offsets);
  std::vector<char> first;
  at_attention_levels(RFK_OP_QUANTIZE, [&](const char* level) {
    Fenced<char> packed(pairs * bytes);
    CHECK(rfk_quantize_keys(&kCpuDevice, k.view(), v.view(), masked ? valid.data() : nullptr, scheme, packed.data()) == RFK_OK, "%s",
          rfk_last_error());
    CHECK(packed.intact(), "a write outside, %s", level);
    const std::vector<char> all(packed.data(), packed.data() + packed.size());
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const Packed p = {packed.data() + pair * bytes, rfk::attention_layout(scheme, keys, channels, value_channels)};
      const bool spoiled = p.part<int32_t>(p.l.flag_at, 0) != 0;
      bool clean = true;
      for (int64_t i = 0; i < keys * channels; ++i) clean = clean && std::isfinite(k.get(pair * keys * channels + i));
      for (int64_t i = 0; i < keys * value_channels; ++i) clean = clean && std::isfinite(v.get(pair * keys * value_channels + i));
      CHECK(spoiled == !clean, "flag, %s", level);
      if (!clean) continue;
      const std::vector<uint8_t> open(valid.begin() + pair * keys, valid.begin() + (pair + 1) * keys);
      check_keys(p, k, pair, open, level);
      check_values(p, v, pair, open, level);
    }
    if (poisoned >= 0) return;
    if (first.empty()) first = all;
    CHECK(first == all, "another packing at %s", level);
  });
}

void refusals() {
  Tensor q(RFK_FLOAT32, {1, 2, 3, 4}, kDense), wide(RFK_FLOAT32, {1, 2, 3, 257}, kDense), flat(RFK_FLOAT32, {2, 3, 4}, kDense);
  Tensor longer(RFK_FLOAT32, {1, 2, 4, 4}, kDense), none(RFK_FLOAT32, {1, 2, 3, 0}, kDense);
  Fenced<int8_t> codes(24);
  Fenced<float> scale(6);
  Fenced<uint8_t> finite(2);
  const rfk_device cuda = {RFK_CUDA, 0, nullptr};
  const auto queries_of = [&](const rfk_tensor* t, int scheme) {
    return rfk_quantize_queries(&kCpuDevice, t, scheme, codes.data(), scale.data(), finite.data());
  };
  refused(rfk_quantize_queries(&cuda, q.view(), 0, codes.data(), scale.data(), finite.data()), "run on the CPU");
  refused(rfk_quantize_queries(nullptr, q.view(), 0, codes.data(), scale.data(), finite.data()), "run on the CPU");
  refused(queries_of(q.view(), 3), "unknown scheme 3");
  refused(queries_of(q.view(), -1), "unknown scheme -1");
  refused(queries_of(q.view(), RFK_ATTENTION_BF16), "no codes");
  refused(queries_of(nullptr, 0), "4 dimensions");
  refused(queries_of(flat.view(), 0), "4 dimensions");
  refused(queries_of(wide.view(), 0), "257");
  refused(queries_of(none.view(), 0), "got 0");
  refused(rfk_quantize_queries(&kCpuDevice, q.view(), 0, nullptr, scale.data(), finite.data()), "missing");
  rfk_tensor changed = *q.view();
  changed.dtype = RFK_BOOL;
  refused(queries_of(&changed, 0), "dtype 4");
  changed = *q.view();
  changed.shape[2] = -3;
  refused(queries_of(&changed, 0), "negative size");
  changed = *q.view();
  changed.data = nullptr;
  refused(queries_of(&changed, 0), "no memory");
  char* const packed = reinterpret_cast<char*>(codes.data());
  refused(rfk_quantize_keys(&kCpuDevice, q.view(), longer.view(), nullptr, 0, packed), "same batch, heads and keys");
  refused(rfk_quantize_keys(&kCpuDevice, q.view(), wide.view(), nullptr, 0, packed), "257");
  refused(rfk_quantize_keys(&kCpuDevice, q.view(), nullptr, nullptr, 0, packed), "v must have 4 dimensions");
  refused(rfk_quantize_keys(&kCpuDevice, q.view(), q.view(), nullptr, 5, packed), "unknown scheme 5");
  refused(rfk_quantize_keys(&kCpuDevice, q.view(), q.view(), nullptr, 0, nullptr), "packed is missing");
  CHECK(codes.intact() && scale.intact() && finite.intact(), "a refused call wrote");
  for (int64_t i = 0; i < codes.size(); ++i) CHECK(codes[i] == 0x5a, "a refused call wrote");
  // The CUDA entry points never run on CPU tensors, nor in a build without CUDA.
  rfk_quantized_heads out = {};
  refused(rfk_quantize_queries_cuda(&kCpuDevice, q.view(), 1, codes.data(), scale.data(), finite.data()), "run on CUDA");
  refused(rfk_quantize_keys_cuda(&kCpuDevice, q.view(), q.view(), nullptr, 1, &out, packed), "run on CUDA");
  if (!rfk_has_cuda()) {
    refused(rfk_quantize_queries_cuda(&cuda, q.view(), 1, codes.data(), scale.data(), finite.data()), "no CUDA kernels");
    refused(rfk_quantize_keys_cuda(&cuda, q.view(), q.view(), nullptr, 1, &out, packed), "no CUDA kernels");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 80;
  refusals();
  Dice dice{17};
  for (int round = 0; round < calls; ++round) {
    queries(dice);
    keys_values(dice);
  }
  std::puts("quantize: passed");
  return 0;
}
