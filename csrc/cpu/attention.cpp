// attention.cpp: softmax(Q K^T) V over quantized keys and values, 32 queries and blocks of 256 keys at a time.
//
// Scores are computed transposed, [key][32 queries], so that the statistics of a query are vertical vector operations and P falls out
// in the order in which the second product reads it. Per block: scores to log2 units and their maximum (pass 1); P = 2^(y - r) to
// codes and its sum (pass 2), r the block's own maximum (a floating reference: it may fall, so that every block uses all bits of P).
// Where AMX computes, pass 1 of a block runs between the P V steps of the block before it and pass 2 between the Q K steps of the block
// after it: the tile unit works while the vector units do. One buffer holds the scores of both blocks, which keeps them in L1.
#include <cmath>

#include "core/arena.h"
#include "core/parallel.h"
#include "cpu/attention_mask.h"
#include "cpu/attention_ops.h"
#include "cpu/products.h"
#include "cpu/quantize.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {
namespace {

constexpr int64_t kKeys = 256;          // of a softmax block
constexpr int64_t kTaskQueries = 128;   // of a task
constexpr int64_t kChunk = 32;          // keys between two pieces of tile work
constexpr float kFloor = 40.0f;         // how far below the running maximum a block's reference may lie, in log2 units
constexpr int64_t kPackedBudget = 1 << 20;  // bytes of packed heads held at a time; one for each thread in any case
constexpr float kOverflow = 1e30f;           // scores that could pass this are left to the exact path

// What one thread works in.
struct alignas(64) Work {
  int32_t scores[kKeys * kQueryRows];
  uint8_t weights[kKeys * kQueryRows * 2];  // P, as B of a product
  int32_t sums[kMaxChannels * kQueryRows];     // P V of one block
  float out[kMaxChannels * kQueryRows];        // [channel][query], relative to the current reference
  float rows[kQueryRows * kMaxChannels];
  float bias[kChunk * kQueryRows];
  OpenKeys open[kKeys / kChunk];
  Queries queries;
  float quantize[kQuantizeScratch];
};

HeadView head_view(const rfk_tensor& t, int64_t batch, int64_t head) {
  const int64_t item = item_size(t.dtype);
  HeadView view;
  view.data = static_cast<const char*>(t.data) + (batch * t.strides[0] + head * t.strides[1]) * item;
  view.dtype = t.dtype;
  view.row_bytes = t.strides[2] * item;
  view.channel_stride = t.strides[3];
  view.channels = t.shape[3];
  return view;
}

MaskView mask_view(const rfk_tensor* t, int64_t batch, int64_t head) {
  MaskView view;
  if (t == nullptr) return view;
  view.dtype = t->dtype;
  view.query_stride = t->strides[2];
  view.key_stride = t->strides[3];
  view.data = static_cast<const char*>(t->data) + (batch * t->strides[0] + head * t->strides[1]) * item_size(t->dtype);
  return view;
}

// One query head against its packed keys and values.
struct Head {
  HeadView q;
  char* out;
  int32_t out_dtype;
  int64_t out_row_bytes, out_channel_stride;
  float* lse;  // NULL: not wanted
  int64_t lse_stride;
  const char* packed;
  const AttentionLayout* layout;
  MaskView mask;        // empty when folded into `addend`
  const float* addend;  // a value per key, added to its scores
  bool folded;
  bool causal;
  float factor;  // log2(e) * scale, over the length of the rotation
  float scale;
  int64_t queries;
};

// `count` products one after the other, each a_next bytes of A and one 32 x 32 block of C further.
template <Numbers N>
struct Pipeline {
  Product product;
  int64_t a_next;
  int count;
  int step = 0;

  // The next product without its store: its place may still be in use.
  void compute() const {
    for (int i = 0; i < product.steps; ++i) product_step<N>(product, i);
  }
  void next() {
    product_store<N>(product);
    --count;
    product.a += a_next;
    product.a_row_sums += kBlock;
    product.c = static_cast<int32_t*>(product.c) + kBlock * kBlock;
  }
  // So many steps, of one product after the other.
  void advance(int steps) {
    for (; steps > 0 && count > 0; --steps) {
      product_step<N>(product, step);
      if (++step < product.steps) continue;
      step = 0;
      next();
    }
  }
  int remaining() const { return count * product.steps - step; }
};

// Scores of 32 keys to log2 units, in place, and their maximum. Kind 0: no mask, 1: open keys, 2: open keys and bias.
template <bool Integer, int Kind>
RFK_INLINE void pass1(int32_t* scores, Floats factor0, Floats factor1, const float* addend, const int32_t* open,
                      const float* bias, Floats* top) {
  const Floats excluded = splat(kMinusInfinity);
  float* y = reinterpret_cast<float*>(scores);
  Floats top0 = top[0], top1 = top[1], top2 = top[2], top3 = top[3];
  const auto one = [&](int64_t j, int half, Floats factor, Floats add) {
    const int64_t at = j * kQueryRows + half * 16;
    Floats x = Integer ? to_float(load(scores + at)) : load(y + at);
    x = fma(x, factor, add);
    if (Kind == 2) x = x + load(bias + at);
    if (Kind != 0) x = select(load(open + half * 16), splat(static_cast<int32_t>(1u << j)), x, excluded);
    store(y + at, x);
    return x;
  };
  for (int64_t j = 0; j < kChunk; j += 2) {
    const Floats add0 = splat(addend[j]), add1 = splat(addend[j + 1]);
    top0 = max(top0, one(j, 0, factor0, add0));
    top1 = max(top1, one(j, 1, factor1, add0));
    top2 = max(top2, one(j + 1, 0, factor0, add1));
    top3 = max(top3, one(j + 1, 1, factor1, add1));
  }
  top[0] = top0;
  top[1] = top1;
  top[2] = top2;
  top[3] = top3;
}

// P = 2^(y - reference) of `count` keys to codes and its sum; for u8 the reference carries log2(255).
template <Numbers PV>
RFK_INLINE void pass2(const float* y, int64_t count, const Floats* reference, const float* inverse, uint8_t* weights,
                      Floats* total) {
  Floats total0 = total[0], total1 = total[1];
  if constexpr (PV == Numbers::kUnsigned) {
    const auto four = [&](int64_t j, int half, Floats r, Floats sum) {
      const float* at = y + j * kQueryRows + half * 16;
      const Floats p0 = exp2<2>(load(at) - r), p1 = exp2<2>(load(at + kQueryRows) - r);
      const Floats p2 = exp2<2>(load(at + 2 * kQueryRows) - r), p3 = exp2<2>(load(at + 3 * kQueryRows) - r);
      sum = fma(p0, splat(inverse[j]), sum);
      sum = fma(p1, splat(inverse[j + 1]), sum);
      sum = fma(p2, splat(inverse[j + 2]), sum);
      sum = fma(p3, splat(inverse[j + 3]), sum);
      store_bytes(weights + j * kQueryRows + half * 64, to_int(p0), to_int(p1), to_int(p2), to_int(p3));
      return sum;
    };
    for (int64_t j = 0; j < count; j += 4) {
      total0 = four(j, 0, reference[0], total0);
      total1 = four(j, 1, reference[1], total1);
    }
  } else {
    const auto two = [&](int64_t j, int half, Floats r, Floats sum) {
      const float* at = y + j * kQueryRows + half * 16;
      const Floats p0 = exp2<3>(load(at) - r), p1 = exp2<3>(load(at + kQueryRows) - r);
      store_bfloat16_pairs(weights + j * kQueryRows * 2 + half * 64, p0, p1);
      return (sum + p0) + p1;
    };
    for (int64_t j = 0; j < count; j += 2) {
      total0 = two(j, 0, reference[0], total0);
      total1 = two(j, 1, reference[1], total1);
    }
  }
  total[0] = total0;
  total[1] = total1;
}

// out = out * rescale + sums for channels [begin, end).
template <bool Integer>
RFK_INLINE void accumulate(float* out, const int32_t* sums, int64_t begin, int64_t end, const Floats* rescale) {
  for (int64_t i = begin * kQueryRows; i < end * kQueryRows; i += 32) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + 16 * half;
      const Floats sum = Integer ? to_float(load(sums + at)) : load(reinterpret_cast<const float*>(sums) + at);
      store(out + at, fma(load(out + at), rescale[half], sum));
    }
  }
}

// Keys of one softmax block that the 32 queries at work may attend, in whole groups; between them may be closed ones.
struct Range {
  int64_t begin, end;
  int64_t chunks() const { return (end - begin) / kChunk; }
};

// Of the blocks from key `from` on the first in which a query may attend anything, without the closed groups at its ends.
// Leaves the open keys of a boolean mask in w.open. A block without open keys would change no result.
template <int Kind>
Range next_block(const Head& h, int64_t first, int rows, int64_t from, int64_t keys, Work& w) {
  for (; from < keys; from += kKeys) {
    const int64_t end = from + kKeys < keys ? from + kKeys : keys;
    if (Kind == 2 || (Kind == 0 && !h.folded)) return {from, end};
    Range range = {end, from};
    if (Kind == 1) {
      open_keys(h.mask, h.causal, first, rows, from, static_cast<int>((end - from) / kChunk), h.layout->keys, w.open);
    }
    for (int64_t at = from; at < end; at += kChunk) {
      if (Kind == 1) {
        if (!w.open[(at - from) / kChunk].any) continue;
      } else {
        const Floats none = splat(kMinusInfinity);
        if ((less(none, load(h.addend + at)) | less(none, load(h.addend + at + 16))) == 0) continue;
      }
      const int64_t group = at - at % kKeyGroup;
      if (range.begin == end) range.begin = group;
      range.end = group + kKeyGroup;
    }
    if (range.begin < range.end) return range;
  }
  return {keys, keys};
}

// out rows = O * value_scale / sum of P, and the log-sum-exp.
void finish(const Head& h, int64_t first, int rows, const Floats* reference, const Floats* total, double weight_scale,
            Work& w) {
  const AttentionLayout& l = *h.layout;
  const float* value_scale = reinterpret_cast<const float*>(h.packed + l.value_scale_at);
  alignas(64) float sum[kQueryRows], inverse[kQueryRows], top[kQueryRows];
  for (int half = 0; half < 2; ++half) {
    store(sum + 16 * half, total[half]);
    store(top + 16 * half, reference[half]);
  }
  // The largest term of a row that attends any key is 1 (times weight_scale); without one only underflow is in the sum.
  for (int i = 0; i < kQueryRows; ++i) inverse[i] = sum[i] > 0.5f ? 1.0f / sum[i] : 0.0f;
  const Floats inverse0 = load(inverse), inverse1 = load(inverse + 16);
  for (int64_t d = 0; d < l.padded_value_channels; ++d) {
    const Floats scale = splat(value_scale[d]);
    float* at = w.out + d * kQueryRows;
    store(at, load(at) * inverse0 * scale);
    store(at + 16, load(at + 16) * inverse1 * scale);
  }
  const float* source = w.out;
  float* target = w.rows;
  for (int64_t d = 0; d < l.padded_value_channels; d += 16) {
    transpose(source + d * kQueryRows, kQueryRows, target + d, l.padded_value_channels);
    transpose(source + d * kQueryRows + 16, kQueryRows, target + 16 * l.padded_value_channels + d, l.padded_value_channels);
  }
  for (int i = 0; i < rows; ++i) {
    store_run(h.out + (first + i) * h.out_row_bytes, h.out_dtype, h.out_channel_stride,
              static_cast<int>(l.value_channels), w.rows + i * l.padded_value_channels);
    if (h.lse == nullptr) continue;
    const double log2_sum = std::log2(static_cast<double>(sum[i])) - std::log2(weight_scale) + static_cast<double>(top[i]);
    h.lse[(first + i) * h.lse_stride] =
        sum[i] > 0.5f ? static_cast<float>(log2_sum * 0.69314718055994531 +
                                           static_cast<double>(h.scale) * static_cast<double>(w.queries.mean_dot[i]))
                      : kMinusInfinity;
  }
}

// Up to 32 queries from `first`; returns false when the head must take the exact path.
template <Numbers QK, Numbers PV, int Kind>
bool attend(const Head& h, int64_t first, int rows, Work& w) {
  const AttentionLayout& l = *h.layout;
  constexpr bool kInteger = QK == Numbers::kSigned;
  constexpr bool kIntegerValues = PV == Numbers::kUnsigned;
  constexpr int kKeysPerStep = kIntegerValues ? 64 : 32;
  constexpr int64_t kWeightBytes = kIntegerValues ? 1 : 2;
  const float* key_scale = reinterpret_cast<const float*>(h.packed + l.key_scale_at);
  const float* inverse = reinterpret_cast<const float*>(h.packed + l.inverse_at);
  const int32_t* row_sum = reinterpret_cast<const int32_t*>(h.packed + l.row_sum_at);
  const float* mean = reinterpret_cast<const float*>(h.packed + l.mean_at);
  quantize_queries(h.q, first, rows, l, h.lse != nullptr && kInteger ? mean : nullptr, &w.queries, w.quantize);
  if (!w.queries.finite) return false;

  Floats factor[2];
  float largest = 0.0f;
  for (int half = 0; half < 2; ++half) {
    const Floats scale = load(w.queries.scale + 16 * half);
    factor[half] = kInteger ? scale * splat(h.factor) : splat(h.factor);
    largest = std::fmax(largest, reduce_max(abs(scale * splat(h.factor))));
  }
  int64_t keys = h.causal && first + rows < l.keys ? first + rows : l.keys;
  keys = round_up(keys, kKeyGroup);
  float top_scale = 0.0f;
  for (int64_t g = 0; g < keys / kKeyGroup; ++g) top_scale = std::fmax(top_scale, key_scale[g]);
  const float most = static_cast<float>(l.padded_channels) * (kInteger ? 127.0f * 127.0f : 1.0f);
  if (!(largest * top_scale * most < kOverflow)) return false;

  const int score_steps = static_cast<int>(l.padded_channels / (kInteger ? 64 : 32));
  const int value_products = static_cast<int>(l.padded_value_channels / 32);
  const auto scores_of = [&](const Range& range) {
    const int64_t tile_row = score_steps * kTileBytes;
    const Product first_keys{h.packed + l.keys_at + range.begin / 16 * tile_row,
                             tile_row,
                             kTileBytes,
                             w.queries.codes,
                             score_steps,
                             row_sum + range.begin,
                             w.scores};
    return Pipeline<QK>{first_keys, 2 * tile_row, static_cast<int>((range.end - range.begin) / kBlock)};
  };
  const auto values_of = [&](const Range& range) {
    const int64_t group = value_products * 2 * kTileBytes;
    const Product first_channels{h.packed + l.values_at + range.begin / kKeysPerStep * group,
                                 kTileBytes,
                                 group,
                                 reinterpret_cast<const char*>(w.weights),
                                 static_cast<int>((range.end - range.begin) / kKeysPerStep),
                                 row_sum,
                                 w.sums};
    return Pipeline<PV>{first_channels, 2 * kTileBytes, value_products};
  };
  const auto quota = [](int total, int64_t chunks) { return static_cast<int>((total + chunks - 1) / chunks); };

  for (int64_t i = 0; i < l.padded_value_channels * kQueryRows; ++i) w.out[i] = 0.0f;
  const Floats none = splat(-1e30f), lowest = splat(-126.0f);
  Floats reference[2] = {none, none}, running[2] = {none, none}, total[2] = {splat(0.0f), splat(0.0f)};
  Floats rescale[2] = {splat(0.0f), splat(0.0f)};
  Range block = next_block<Kind>(h, first, rows, 0, keys, w), before = {0, 0};  // before: empty at first
  if (block.begin < keys) {
    auto scores = scores_of(block);
    scores.advance(scores.remaining());
  }

  while (block.begin < keys) {
    const int64_t chunks = block.chunks();
    const bool pending = before.begin < before.end;  // products of P and V of the block before
    auto values = values_of(before);
    const int value_quota = pending ? quota(values.remaining(), chunks) : 0;
    Floats top[4] = {splat(kMinusInfinity), splat(kMinusInfinity), splat(kMinusInfinity), splat(kMinusInfinity)};
    for (int64_t c = 0; c < chunks; ++c) {
      values.advance(value_quota);
      const int64_t at = block.begin + c * kChunk;
      const Floats scale = splat(kInteger ? key_scale[at / kKeyGroup] : 1.0f);
      int32_t* chunk = w.scores + c * kChunk * kQueryRows;
      const Floats factor0 = factor[0] * scale, factor1 = factor[1] * scale;
      OpenKeys& open = w.open[at % kKeys / kChunk];
      const bool diagonal = h.causal && at + kChunk > first + 1;
      if (Kind == 2 || (Kind == 0 && diagonal)) open_keys(h.mask, h.causal, first, rows, at, 1, l.keys, &open);
      if (Kind == 2) {
        if (!turned_bias(h.mask, first, rows, at, l.keys, w.bias)) return false;
        pass1<kInteger, 2>(chunk, factor0, factor1, h.addend + at, open.rows, w.bias, top);
      } else if (Kind == 1 ? open.all : !diagonal) {
        pass1<kInteger, 0>(chunk, factor0, factor1, h.addend + at, nullptr, nullptr, top);
      } else {
        pass1<kInteger, 1>(chunk, factor0, factor1, h.addend + at, open.rows, nullptr, top);
      }
    }
    Floats previous[2] = {rescale[0], rescale[1]}, lifted[2];
    for (int half = 0; half < 2; ++half) {
      const Floats mine = max(top[half], top[half + 2]);
      running[half] = max(running[half], mine);
      // A block in which a query may attend nothing changes nothing.
      const Floats next = select(less(mine, none), reference[half], max(mine, running[half] - splat(kFloor)));
      rescale[half] = exp2<5>(max(reference[half] - next, lowest));
      reference[half] = next;
      total[half] = total[half] * rescale[half];
      lifted[half] = kIntegerValues ? next - splat(7.994353437f) : next;  // log2(255)
    }
    const Range after = next_block<Kind>(h, first, rows, (block.begin / kKeys + 1) * kKeys, keys, w);
    auto scores = scores_of(after);
    for (int64_t c = 0; c < chunks; ++c) {
      // The next block's scores of these 32 places are computed while pass 2 reads the places, then stored there.
      const bool follows = scores.count > 0;
      if (follows) scores.compute();
      if (pending) {
        accumulate<kIntegerValues>(w.out, w.sums, l.padded_value_channels * c / chunks,
                                   l.padded_value_channels * (c + 1) / chunks, previous);
      }
      pass2<PV>(reinterpret_cast<const float*>(w.scores) + c * kChunk * kQueryRows, kChunk, lifted,
                inverse + block.begin + c * kChunk, w.weights + c * kChunk * kQueryRows * kWeightBytes, total);
      if (follows) scores.next();
    }
    scores.advance(scores.remaining());  // of a next block that is the longer
    before = block;
    block = after;
  }
  if (before.begin < before.end) {
    auto values = values_of(before);
    values.advance(values.remaining());
    accumulate<kIntegerValues>(w.out, w.sums, 0, l.padded_value_channels, rescale);
  }
  finish(h, first, rows, reference, total, kIntegerValues ? 255.0 : 1.0, w);
  return true;
}

template <int Kind>
bool attend_scheme(const Head& h, int64_t first, int rows, Work& w) {
  switch (h.layout->scheme) {
    case RFK_ATTENTION_INT8_U8: return attend<Numbers::kSigned, Numbers::kUnsigned, Kind>(h, first, rows, w);
    case RFK_ATTENTION_INT8_BF16: return attend<Numbers::kSigned, Numbers::kBfloat16, Kind>(h, first, rows, w);
    default: return attend<Numbers::kBfloat16, Numbers::kBfloat16, Kind>(h, first, rows, w);
  }
}

// The packed addend with a mask that is the same for all queries; false when the mask has a NaN or a value above 1e30.
bool fold_mask(const MaskView& mask, const AttentionLayout& l, const float* packed, float* addend) {
  bool good = true;
  for (int64_t j = 0; j < l.padded_keys; ++j) addend[j] = packed[j];
  for (int64_t j = 0; j < l.keys; ++j) {
    if (mask.boolean()) {
      if (*mask.at(0, j) == 0) addend[j] = kMinusInfinity;
    } else {
      float value;
      load_run(mask.at(0, j), mask.dtype, 1, 1, &value);
      good = scale_mask(&value, 1) && good;
      addend[j] += value;
    }
  }
  return good;
}

void set_exact(uint8_t* flag) { __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED); }  // several threads may

// Queries [begin, end) of query head `head` of sample `batch`.
void run_task(const AttentionArguments& a, int64_t batch, int64_t head, int64_t begin, int64_t end, const char* packed,
              Work& w, float* addend) {
  const AttentionLayout& l = a.layout;
  uint8_t* exact = a.exact + batch * a.q->shape[1] + head;
  int32_t flag;
  std::memcpy(&flag, packed + l.flag_at, sizeof flag);
  if (flag != 0) return set_exact(exact);
  Head h;
  h.q = head_view(*a.q, batch, head);
  const int64_t item = item_size(a.out->dtype);
  h.out = static_cast<char*>(a.out->data) + (batch * a.out->strides[0] + head * a.out->strides[1]) * item;
  h.out_dtype = a.out->dtype;
  h.out_row_bytes = a.out->strides[2] * item;
  h.out_channel_stride = a.out->strides[3];
  h.lse = a.lse == nullptr ? nullptr
                           : static_cast<float*>(a.lse->data) + batch * a.lse->strides[0] + head * a.lse->strides[1];
  h.lse_stride = a.lse == nullptr ? 0 : a.lse->strides[2];
  h.packed = packed;
  h.layout = &l;
  h.mask = mask_view(a.mask, batch, head);
  h.addend = reinterpret_cast<const float*>(packed + l.addend_at);
  h.folded = false;
  h.causal = a.causal;
  const double rotation = l.int8_keys() ? static_cast<double>(l.rotated) : 1.0;
  h.factor = static_cast<float>(a.scale * 1.4426950408889634 / rotation);
  h.scale = static_cast<float>(a.scale);
  h.queries = a.q->shape[2];
  if (h.mask.data != nullptr && (h.mask.query_stride == 0 || h.queries == 1)) {
    if (!fold_mask(h.mask, l, h.addend, addend)) return set_exact(exact);
    h.addend = addend;
    h.folded = true;
    h.mask.data = nullptr;
  }
  const TileState tiles;
  for (int64_t first = begin; first < end; first += kQueryRows) {
    const int rows = static_cast<int>(end - first < kQueryRows ? end - first : kQueryRows);
    const bool done = h.mask.data == nullptr    ? attend_scheme<0>(h, first, rows, w)
                      : h.mask.boolean()        ? attend_scheme<1>(h, first, rows, w)
                                                : attend_scheme<2>(h, first, rows, w);
    if (!done) return set_exact(exact);
  }
}

// valid[(sample, set), key]: some query of the set may attend the key. A sample has `sets`, each of `heads` heads' masks.
void mark_all_valid(const AttentionArguments& a, int64_t sets, int64_t heads, int threads, uint8_t* valid) {
  constexpr int64_t kPart = 1024;  // keys of a task
  const int64_t keys = a.layout.keys, queries = a.q->shape[2], parts = (keys + kPart - 1) / kPart;
  std::memset(valid, 0, static_cast<size_t>(a.q->shape[0] * sets * keys));
  parallel_tasks(a.q->shape[0] * sets * parts, threads, [&](int64_t task, int) {
    const int64_t place = task / parts, begin = task % parts * kPart;
    const int64_t end = begin + kPart < keys ? begin + kPart : keys;
    for (int64_t g = 0; g < heads; ++g) {
      const MaskView mask = mask_view(a.mask, place / sets, place % sets * heads + g);
      mark_valid(mask, a.causal, queries, begin, end, valid + place * keys);
    }
  });
}

int threads_for(int64_t elements) { return elements < kSerialElements ? 1 : max_threads(); }

}  // namespace

bool attention(const AttentionArguments& a) {
  const AttentionLayout& l = a.layout;
  const int64_t batches = a.q->shape[0], heads = a.q->shape[1], queries = a.q->shape[2];
  const int64_t group = heads / a.key_heads, packs = batches * a.key_heads;
  const int threads = threads_for(packs * group * queries * (l.keys + l.channels));
  static thread_local Arena packed_arena, work_arena, valid_arena;
  const int64_t addend_bytes = round_up(l.padded_keys * 4, 64);
  const int64_t work_bytes = static_cast<int64_t>(sizeof(Work)) + addend_bytes;
  char* work = work_arena.take(work_bytes * threads);
  // Which keys some query may attend: of every head of K, or of a sample where its heads share the mask.
  const bool masked = a.packed == nullptr && (a.mask != nullptr || a.causal);
  const bool by_head = a.mask != nullptr && a.mask->strides[1] != 0;
  const int64_t valid_sets = masked ? (by_head ? packs : batches) : 0;
  uint8_t* valid = reinterpret_cast<uint8_t*>(masked ? valid_arena.take(valid_sets * l.keys + 1) : nullptr);
  int64_t held = packs;  // packed heads at a time
  if (a.packed == nullptr) {
    held = kPackedBudget / l.bytes;
    held = held < threads ? threads : held;
    held = held < packs ? held : packs;
  }
  char* own = a.packed == nullptr ? packed_arena.take(held * l.bytes) : nullptr;
  if (work == nullptr || (a.packed == nullptr && own == nullptr) || (masked && valid == nullptr)) return false;
  if (masked) mark_all_valid(a, by_head ? a.key_heads : 1, by_head ? group : 1, threads, valid);
  const int64_t chunks = (queries + kTaskQueries - 1) / kTaskQueries;
  for (int64_t begin = 0; begin < packs; begin += held) {
    const int64_t count = packs - begin < held ? packs - begin : held;
    if (a.packed == nullptr) {
      parallel_tasks(count, threads, [&](int64_t task, int worker) {
        const int64_t batch = (begin + task) / a.key_heads, head = (begin + task) % a.key_heads;
        const uint8_t* open = masked ? valid + (by_head ? begin + task : batch) * l.keys : nullptr;
        Work& w = *reinterpret_cast<Work*>(work + worker * work_bytes);
        quantize_keys_values(head_view(*a.k, batch, head), head_view(*a.v, batch, head), open, l, own + task * l.bytes,
                             w.quantize);
      });
    }
    const char* packed = a.packed != nullptr ? a.packed + begin * l.bytes : own;
    parallel_tasks(count * group * chunks, threads, [&](int64_t task, int worker) {
      // Of a causal head the last queries first: they take longest.
      const int64_t chunk = chunks - 1 - task % chunks, local = task / chunks;
      const int64_t pack = begin + local / group, head = pack % a.key_heads * group + local % group;
      const int64_t last = (chunk + 1) * kTaskQueries < queries ? (chunk + 1) * kTaskQueries : queries;
      char* place = work + worker * work_bytes;
      run_task(a, pack / a.key_heads, head, chunk * kTaskQueries, last, packed + local / group * l.bytes,
               *reinterpret_cast<Work*>(place), reinterpret_cast<float*>(place + sizeof(Work)));
    });
  }
  packed_arena.trim();
  work_arena.trim();
  valid_arena.trim();
  return true;
}

bool quantize_keys(const QuantizeKeysArguments& a) {
  const int64_t heads = a.k->shape[1], packs = a.k->shape[0] * heads;
  const int threads = threads_for(packs * a.layout.keys * a.layout.channels);
  static thread_local Arena arena;
  float* scratch = reinterpret_cast<float*>(arena.take(kQuantizeScratch * 4 * threads));
  if (scratch == nullptr) return false;
  parallel_tasks(packs, threads, [&](int64_t task, int worker) {
    const uint8_t* valid = a.valid == nullptr ? nullptr : a.valid + task * a.layout.keys;
    quantize_keys_values(head_view(*a.k, task / heads, task % heads), head_view(*a.v, task / heads, task % heads), valid,
                         a.layout, a.packed + task * a.layout.bytes, scratch + worker * kQuantizeScratch);
  });
  return true;
}

bool quantize_queries(const QuantizeQueriesArguments& a) {
  const int64_t heads = a.q->shape[1], rows = a.q->shape[2];
  static thread_local Arena arena;
  float* scratch = reinterpret_cast<float*>(arena.take(kQuantizeScratch * 4));
  if (scratch == nullptr) return false;
  for (int64_t head = 0; head < a.q->shape[0] * heads; ++head) {
    const HeadView view = head_view(*a.q, head / heads, head % heads);
    a.finite[head] = quantize_query_rows(view, 0, static_cast<int>(rows), a.layout, a.codes + head * rows * a.layout.rotated,
                                         a.scale + head * rows, scratch);
  }
  return true;
}

extern const AttentionOps kAttentionOps;
const AttentionOps kAttentionOps = {attention, quantize_keys, quantize_queries};

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
