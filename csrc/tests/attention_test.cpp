// attention_test.cpp: attention of every level, scheme, mask and layout against a softmax in double; refused arguments.
#include <algorithm>

#include "attention_checks.h"

using namespace rfk_test;

namespace {

constexpr int kTypes[] = {RFK_FLOAT32, RFK_BFLOAT16, RFK_FLOAT16, RFK_FLOAT64};
constexpr double kInfinity = INFINITY;

// A mask as (B, H, Sq, Sk) with some dimensions broadcast by a stride of 0, or none at all.
class Mask {
 public:
  Mask(Dice& dice, const int64_t (&shape)[4]) {
    const int kind = dice.roll(4);
    if (kind == 0) return;
    const bool boolean = kind < 3;
    view_.dtype = boolean ? static_cast<int>(RFK_BOOL) : kTypes[dice.roll(4)];
    view_.ndim = 4;
    item_ = boolean ? 1 : item_size(view_.dtype);
    int64_t step = dice.roll(4) ? 1 : 2;
    for (int d = 3; d >= 0; --d) {
      const bool broadcast = dice.roll(3) == 0;
      view_.shape[d] = shape[d];
      view_.strides[d] = broadcast ? 0 : step;
      if (!broadcast) step *= shape[d];
    }
    memory_.assign(static_cast<size_t>(step * item_), 0);
    const int open = 1 + dice.roll(3);  // of three
    // Open keys in one place, so that whole blocks are closed: a padded end or start, or a part for each query.
    const int shape_of_it = dice.roll(6), parts = 1 + dice.roll(9);
    const int64_t rows = std::max<int64_t>(shape[2], 1), columns = std::max<int64_t>(shape[3], 1);
    const int64_t cut = dice.roll(static_cast<int>(columns) + 1);
    const auto elsewhere = [&](int64_t i) {
      const int64_t key = view_.strides[3] == 0 ? 0 : i / view_.strides[3] % columns;
      const int64_t query = view_.strides[2] == 0 ? 0 : i / view_.strides[2] % rows;
      switch (shape_of_it) {
        case 0: return key >= cut;
        case 1: return key < cut;
        case 2: return key * parts / columns != query * parts / rows;
        default: return false;
      }
    };
    for (int64_t i = 0; i < step; ++i) {
      const bool closed = dice.roll(3) >= open || elsewhere(i);
      if (boolean) {
        memory_[static_cast<size_t>(i)] = !closed;
      } else {
        const double value = closed ? (dice.roll(2) ? -kInfinity : -1.5e30) : dice.real();
        write_value(view_.dtype, &memory_[static_cast<size_t>(i * item_)], stored(view_.dtype, value));
      }
    }
    // In reverse: the last element first, as a flipped view would have it.
    char* place = memory_.data();
    if (dice.roll(4) == 0 && step > 0) {
      for (int d = 0; d < 4; ++d) {
        place += (view_.shape[d] - 1) * view_.strides[d] * item_;
        view_.strides[d] = -view_.strides[d];
      }
    }
    view_.data = shape[0] * shape[1] * shape[2] * shape[3] > 0 ? place : nullptr;
    given_ = true;
  }
  const rfk_tensor* view() const { return given_ ? &view_ : nullptr; }
  // What is added to the score; -infinity where the key is closed.
  double at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!given_) return 0.0;
    const char* p = static_cast<const char*>(view_.data) +
                    (b * view_.strides[0] + h * view_.strides[1] + i * view_.strides[2] + j * view_.strides[3]) * item_;
    if (view_.dtype == RFK_BOOL) return *p ? 0.0 : -kInfinity;
    const double value = read_value(view_.dtype, p);
    return value <= -1e30 ? -kInfinity : value;
  }

 private:
  rfk_tensor view_{};
  std::vector<char> memory_;
  int64_t item_ = 1;
  bool given_ = false;
};

std::vector<char> bits_of(const Tensor& t) { return t.memory(); }

void one(Dice& dice) {
  const int scheme = dice.roll(3), dtype = kTypes[dice.roll(4)];
  const int64_t batch = 1 + dice.roll(2), key_heads = 1 + dice.roll(2), heads = key_heads * (1 + dice.roll(3));
  const int64_t queries = dice.roll(15) ? 1 + some_keys(dice) % 75 : 0, keys = dice.roll(15) ? some_keys(dice) : 0;
  const int64_t channels = some_channels(dice), value_channels = dice.roll(2) ? channels : some_channels(dice);
  Tensor q(dtype, {batch, heads, queries, channels}, dice.roll(kLayouts));
  Tensor k(dtype, {batch, key_heads, keys, channels}, dice.roll(kLayouts));
  Tensor v(dtype, {batch, key_heads, keys, value_channels}, dice.roll(kLayouts));
  fill_heads(dice, q, false);
  fill_heads(dice, k, scheme != RFK_ATTENTION_BF16);
  fill_heads(dice, v, false);
  const int64_t shape[4] = {batch, heads, queries, keys};
  const Mask mask(dice, shape);
  const bool causal = dice.roll(3) == 0;
  const double scale = (dice.roll(8) ? 1.0 : -0.5) / std::sqrt(static_cast<double>(channels));

  std::vector<double> want(static_cast<size_t>(batch * heads * queries * value_channels), 0.0), norm;
  for (int64_t row = 0; row < batch * heads * queries; ++row) {
    const int64_t i = row % queries, h = row / queries % heads, b = row / queries / heads;
    const int64_t pair = b * key_heads + h / (heads / key_heads);
    std::vector<double> score;
    double top = -kInfinity, sum = 0.0;
    for (int64_t j = 0; j < keys; ++j) {
      double s = causal && j > i ? -kInfinity : mask.at(b, h, i, j);
      if (s > -kInfinity) {
        double dot = 0.0;
        for (int64_t d = 0; d < channels; ++d) dot += q.get(row * channels + d) * k.get((pair * keys + j) * channels + d);
        s += dot * scale;
      }
      score.push_back(s);
      top = std::max(top, s);
    }
    for (int64_t j = 0; j < keys && top > -kInfinity; ++j) {
      const double p = std::exp(score[static_cast<size_t>(j)] - top);
      sum += p;
      for (int64_t d = 0; d < value_channels && p > 0.0; ++d) {
        want[static_cast<size_t>(row * value_channels + d)] += p * v.get((pair * keys + j) * value_channels + d);
      }
    }
    for (int64_t d = 0; d < value_channels && sum > 0.0; ++d) want[static_cast<size_t>(row * value_channels + d)] /= sum;
    norm.push_back(sum > 0.0 ? top + std::log(sum) : -kInfinity);
  }

  const int out_layout = dice.roll(kOutputLayouts), lse_layout = dice.roll(kOutputLayouts);
  const bool with_lse = dice.roll(4) != 0, packed_first = mask.view() == nullptr && !causal && dice.roll(2);
  int64_t offsets[9];
  const int64_t bytes = rfk_quantized_bytes(scheme, keys, channels, value_channels, offsets);
  std::vector<char> first_out, first_lse;
  const bool counted = batch * heads * queries > 0;
  const auto run = [&](const char* level) {
    Tensor out(dtype, {batch, heads, queries, value_channels}, out_layout), lse(RFK_FLOAT32, {batch, heads, queries}, lse_layout);
    Fenced<uint8_t> exact(batch * heads);
    std::memset(exact.data(), 0, static_cast<size_t>(exact.size()));
    Fenced<char> packed(batch * key_heads * bytes);
    if (packed_first) {
      CHECK(rfk_quantize_keys(&kCpuDevice, k.view(), v.view(), nullptr, scheme, packed.data()) == RFK_OK, "%s", rfk_last_error());
    }
    CHECK(rfk_attention(&kCpuDevice, q.view(), packed_first ? nullptr : k.view(), packed_first ? nullptr : v.view(),
                        packed_first ? packed.data() : nullptr, keys, value_channels, key_heads, mask.view(), causal, scale, scheme,
                        out.view(), with_lse ? lse.view() : nullptr, exact.data()) == RFK_OK,
          "%s", rfk_last_error());
    CHECK(out.gaps_untouched() && lse.gaps_untouched() && exact.intact() && packed.intact(), "a write outside, %s", level);
    double error = 0.0, size = 0.0;
    for (int64_t i = 0; i < out.numel(); ++i) {
      const double got = out.get(i), truth = want[static_cast<size_t>(i)];
      CHECK(std::isfinite(got), "out %lld, %s", static_cast<long long>(i), level);
      if (norm[static_cast<size_t>(i / value_channels)] == -kInfinity) CHECK(got == 0.0, "a row without keys, %s", level);
      error += (got - truth) * (got - truth);
      size += truth * truth;
    }
    // Coarse on purpose: a wrong mask, stride or head is off by its own size; how exact the numbers are is measured elsewhere.
    CHECK(error <= 0.0064 * size + 1e-9, "scheme %d, %s: off by %.3g of %.3g", scheme, level, std::sqrt(error), std::sqrt(size));
    for (int64_t i = 0; with_lse && i < lse.numel(); ++i) {
      const double got = lse.get(i), truth = norm[static_cast<size_t>(i)];
      CHECK(truth == -kInfinity ? got == truth : std::fabs(got - truth) <= 0.15, "lse %lld, %s: %g, expected %g",
            static_cast<long long>(i), level, got, truth);
    }
    for (int64_t i = 0; i < exact.size(); ++i) CHECK(exact[i] == 0, "a head was given up, %s", level);
    if (scheme != RFK_ATTENTION_INT8_U8) return;
    if (first_out.empty()) {
      first_out = bits_of(out);
      first_lse = bits_of(lse);
    }
    CHECK(first_out == bits_of(out), "other bits of out at %s", level);
    CHECK(first_lse == bits_of(lse), "other bits of lse at %s", level);
  };
  if (counted) {
    at_attention_levels(RFK_OP_ATTENTION, run);
  } else {
    run("no rows");
  }
}

// Heads that hold a NaN or an infinity are handed back, the others are as they would be without them.
void spoilt(Dice& dice) {
  const int scheme = dice.roll(3), which = dice.roll(3);
  const int64_t heads = 4, queries = 1 + dice.roll(70), keys = some_keys(dice), channels = some_channels(dice);
  Tensor q(RFK_FLOAT32, {1, heads, queries, channels}, kDense), k(RFK_FLOAT32, {1, 2, keys, channels}, kDense);
  Tensor v(RFK_FLOAT32, {1, 2, keys, channels}, kDense), mask(RFK_FLOAT32, {1, heads, queries, keys}, kDense);
  fill_heads(dice, q, false);
  fill_heads(dice, k, true);
  fill_heads(dice, v, false);
  for (int64_t i = 0; i < mask.numel(); ++i) mask.set(i, dice.real());
  const double odd[] = {NAN, INFINITY, -INFINITY};
  Tensor& target = which == 0 ? q : which == 1 ? k : v;
  const int64_t pairs = target.view()->shape[1], head = dice.roll(static_cast<int>(pairs));
  const bool in_mask = dice.roll(4) == 0;
  at_attention_levels(RFK_OP_ATTENTION, [&](const char* level) {
    Tensor clean(RFK_FLOAT32, {1, heads, queries, channels}, kDense), out(RFK_FLOAT32, {1, heads, queries, channels}, kDense);
    Fenced<uint8_t> exact(heads);
    const auto attend = [&](const Tensor& result) {
      std::memset(exact.data(), 0, static_cast<size_t>(heads));
      CHECK(rfk_attention(&kCpuDevice, q.view(), k.view(), v.view(), nullptr, 0, 0, 0, mask.view(), 0, 0.3, scheme, result.view(),
                          nullptr, exact.data()) == RFK_OK,
            "%s", rfk_last_error());
    };
    attend(clean);
    Tensor& holder = in_mask ? mask : target;
    const int64_t each = holder.numel() / holder.view()->shape[1], spot = (in_mask ? head % heads : head) * each + dice.roll(static_cast<int>(each));
    const double before = holder.get(spot);
    holder.set(spot, in_mask ? odd[dice.roll(2)] : odd[dice.roll(3)]);
    attend(out);
    holder.set(spot, before);
    CHECK(exact.intact(), "a write outside, %s", level);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t group = in_mask || which == 0 ? h : h / 2;
      CHECK((exact[h] != 0) == (group == head), "scheme %d, head %lld is%s given up, %s", scheme, static_cast<long long>(h),
            exact[h] ? "" : " not", level);
      if (exact[h]) continue;
      for (int64_t i = h * queries * channels; i < (h + 1) * queries * channels; ++i) {
        CHECK(out.get(i) == clean.get(i), "a head beside a spoilt one, %s", level);
      }
    }
  });
}

void refusals() {
  Tensor q(RFK_FLOAT32, {2, 4, 3, 8}, kDense), k(RFK_FLOAT32, {2, 2, 5, 8}, kDense), v(RFK_FLOAT32, {2, 2, 5, 6}, kDense);
  Tensor out(RFK_FLOAT32, {2, 4, 3, 6}, kDense), other_out(RFK_FLOAT32, {2, 4, 3, 8}, kDense), shared(RFK_FLOAT32, {2, 4, 3, 6}, kBroadcast);
  Tensor lse(RFK_FLOAT32, {2, 4, 3}, kDense), half_lse(RFK_FLOAT16, {2, 4, 3}, kDense), long_lse(RFK_FLOAT32, {2, 4, 4}, kDense);
  Tensor shared_lse(RFK_FLOAT32, {2, 4, 3}, kBroadcast), mask(RFK_FLOAT32, {2, 4, 3, 6}, kDense), wide(RFK_FLOAT32, {2, 4, 3, 257}, kDense);
  Tensor three(RFK_FLOAT32, {2, 3, 5, 8}, kDense), three_v(RFK_FLOAT32, {2, 3, 5, 6}, kDense), narrow(RFK_FLOAT32, {2, 2, 5, 7}, kDense);
  Tensor one_batch(RFK_FLOAT32, {1, 2, 5, 8}, kDense), one_v(RFK_FLOAT32, {1, 2, 5, 6}, kDense);
  Fenced<uint8_t> exact(8);
  const rfk_device cuda = {RFK_CUDA, 0, nullptr};
  struct Call {
    const rfk_device* device;
    const rfk_tensor *q, *k, *v;
    const void* packed;
    int64_t keys, value_channels, key_heads;
    const rfk_tensor* mask;
    int scheme;
    const rfk_tensor *out, *lse;
    uint8_t* exact;
  };
  const Call good = {&kCpuDevice, q.view(), k.view(), v.view(), nullptr, 0, 0, 0, nullptr, 0, out.view(), lse.view(), exact.data()};
  const auto refuse = [](const Call& c, const char* words) {
    refused(rfk_attention(c.device, c.q, c.k, c.v, c.packed, c.keys, c.value_channels, c.key_heads, c.mask, 0, 1.0, c.scheme, c.out,
                          c.lse, c.exact), words);
  };
  const auto with = [&](const auto& change, const char* words) {
    Call c = good;
    change(c);
    refuse(c, words);
  };
  with([&](Call& c) { c.device = &cuda; }, "run on the CPU");
  with([&](Call& c) { c.device = nullptr; }, "run on the CPU");
  with([&](Call& c) { c.scheme = 3; }, "unknown scheme 3");
  with([&](Call& c) { c.q = nullptr; }, "q must have 4 dimensions");
  with([&](Call& c) { c.q = lse.view(); }, "q must have 4 dimensions");
  with([&](Call& c) { c.q = wide.view(); }, "257");
  with([&](Call& c) { c.k = nullptr; }, "k must have 4 dimensions");
  with([&](Call& c) { c.v = k.view(), c.k = three.view(); }, "same batch, heads and keys");
  with([&](Call& c) { c.k = three.view(), c.v = three_v.view(); }, "multiple");
  with([&](Call& c) { c.k = narrow.view(); }, "channels of q");
  with([&](Call& c) { c.k = one_batch.view(), c.v = one_v.view(); }, "batch and the channels");
  with([&](Call& c) { c.out = other_out.view(); }, "out must be");
  with([&](Call& c) { c.out = nullptr; }, "out must have 4 dimensions");
  with([&](Call& c) { c.out = shared.view(); }, "memory of its own");
  with([&](Call& c) { c.lse = half_lse.view(); }, "lse must be float32");
  with([&](Call& c) { c.lse = long_lse.view(); }, "lse must be float32");
  with([&](Call& c) { c.lse = shared_lse.view(); }, "memory of its own");
  with([&](Call& c) { c.mask = mask.view(); }, "mask must be");
  with([&](Call& c) { c.mask = lse.view(); }, "mask must have 4 dimensions");
  with([&](Call& c) { c.exact = nullptr; }, "exact is missing");
  char some[64] = {};
  with([&](Call& c) { c.packed = some, c.keys = -1, c.value_channels = 6, c.key_heads = 2; }, "shape of the packed keys");
  with([&](Call& c) { c.packed = some, c.keys = 5, c.value_channels = 6; }, "shape of the packed keys");
  with([&](Call& c) { c.packed = some, c.keys = 5, c.value_channels = 300, c.key_heads = 2; }, "shape of the packed keys");
  with([&](Call& c) { c.packed = some, c.keys = 5, c.value_channels = 6, c.key_heads = 3; }, "multiple");
  rfk_tensor changed = *q.view();
  changed.dtype = RFK_BOOL;
  with([&](Call& c) { c.q = &changed; }, "dtype 4");
  changed = *k.view();
  changed.data = nullptr;
  with([&](Call& c) { c.k = &changed; }, "no memory");
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 20;
  refusals();
  Dice dice{29};
  for (int round = 0; round < calls; ++round) {
    one(dice);
    if (round % 4 == 0) spoilt(dice);
  }
  std::puts("attention: passed");
  return 0;
}
