// cuda_emulation_test.cpp: the CUDA kernels and launchers, run on the CPU (emulation/cuda_runtime.h), against plain loops.
//
//   g++ -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-unknown-pragmas
//       -DRFK_CUDA_EMULATION -DRFK_CUDA_ARCHS='"emulated"' -DRFK_X86=0 -DRFK_ISA_NAMESPACE=baseline
//       -Icsrc/tests/emulation -Icsrc -Icsrc/include csrc/tests/cuda_emulation_test.cpp csrc/tests/emulation/*.cpp
//
// Random calls of every op (dtypes, shapes, layouts, per-sample and device scalars, noise); results are compared bit for
// bit with the formulas of rfk.h written as loops over elements, losses and pseudo-Huber gradients within a bound. Each call
// runs with the threads of a block in ascending and in descending order. Buffers are exactly as large as the tensors, so
// AddressSanitizer sees an access beyond a tail. What this cannot show: the code nvcc makes of it, and timing.
// Arguments: number of random calls per op (default 150), first seed (default 1).
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

#include "cpu/convert.h"
#include "cuda/cuda_ops.h"
#include "cuda_runtime.h"
#include "rfk/paths.h"

namespace rfk {
void set_error(const char* format, ...);
void set_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}
}  // namespace rfk

namespace {

using rfk::baseline::bfloat16_from_float;
using rfk::baseline::float16_from_float;
using rfk::baseline::float_from_bfloat16;
using rfk::baseline::float_from_float16;

// A small generator of its own, so that a failing call can be repeated from its seed.
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
  double real() { return static_cast<double>(next() >> 11) * 0x1p-53 * 4.0 - 2.0; }
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

int item_size(int dtype) { return dtype == RFK_FLOAT64 ? 8 : dtype == RFK_FLOAT32 ? 4 : 2; }

enum Layout { kPlain, kReversed, kSamplesOutermost, kGaps, kShifted, kBackwards, kBroadcast, kLayouts };

// A tensor in memory that ends and begins where its elements do.
class Tensor {
 public:
  Tensor(int dtype, const std::vector<int64_t>& shape, int layout) {
    view.dtype = dtype;
    view.ndim = static_cast<int32_t>(shape.size());
    const int n = view.ndim;
    std::vector<int> order(static_cast<size_t>(n));  // outermost to innermost
    for (int d = 0; d < n; ++d) order[static_cast<size_t>(d)] = d;
    if (layout == kReversed) std::reverse(order.begin(), order.end());
    if (layout == kSamplesOutermost && n > 2) std::reverse(order.begin() + 1, order.end());
    int64_t step = layout == kGaps ? 2 : 1;
    int64_t low = 0, high = 0;
    for (int i = n - 1; i >= 0; --i) {
      const int d = order[static_cast<size_t>(i)];
      view.shape[d] = shape[static_cast<size_t>(d)];
      view.strides[d] = layout == kBackwards && i == n - 1 ? -step : layout == kBroadcast && i == n / 2 ? 0 : step;
      step *= std::max<int64_t>(view.shape[d], 1);
      if (layout == kGaps && i == n - 1) step += 3;
      const int64_t reach = (view.shape[d] - 1) * view.strides[d];
      (reach < 0 ? low : high) += reach;
      numel *= view.shape[d];
    }
    const int64_t shift = layout == kShifted ? 1 : 0;
    items_ = numel == 0 ? 0 : high - low + 1 + shift;
    bytes_ = std::malloc(static_cast<size_t>(std::max<int64_t>(items_ * item_size(dtype), 1)));
    view.data = static_cast<char*>(bytes_) + (shift - low) * item_size(dtype);
  }
  ~Tensor() { std::free(bytes_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  void fill(Dice& dice) {
    for (int64_t i = 0; i < numel; ++i) put(i, dice.real());
  }
  // Of the element with that logical index.
  double get(int64_t logical) const {
    const char* p = place(logical);
    if (view.dtype == RFK_FLOAT64) return read<double>(p);
    if (view.dtype == RFK_FLOAT32) return read<float>(p);
    return view.dtype == RFK_BFLOAT16 ? float_from_bfloat16(read<uint16_t>(p)) : float_from_float16(read<uint16_t>(p));
  }
  void put(int64_t logical, double value) {
    char* p = place(logical);
    if (view.dtype == RFK_FLOAT64) write(p, value);
    const float narrow = static_cast<float>(value);
    if (view.dtype == RFK_FLOAT32) write(p, narrow);
    if (view.dtype == RFK_BFLOAT16) write(p, bfloat16_from_float(narrow));
    if (view.dtype == RFK_FLOAT16) write(p, float16_from_float(narrow));
  }
  void copy_bytes(const Tensor& other) {
    std::memcpy(bytes_, other.bytes_, static_cast<size_t>(items_ * item_size(view.dtype)));
  }

  rfk_tensor view = {};
  int64_t numel = 1;

 private:
  template <class T>
  static T read(const char* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  template <class T>
  static void write(char* p, T value) {
    std::memcpy(p, &value, sizeof value);
  }
  char* place(int64_t logical) const {
    int64_t offset = 0;
    for (int d = view.ndim - 1; d >= 0; --d) {
      offset += logical % view.shape[d] * view.strides[d];
      logical /= view.shape[d];
    }
    return static_cast<char*>(view.data) + offset * item_size(view.dtype);
  }
  void* bytes_;
  int64_t items_;
};

using Ptr = std::unique_ptr<Tensor>;

double stored(int dtype, double value) {
  if (dtype == RFK_FLOAT64) return value;
  const float narrow = static_cast<float>(value);
  if (dtype == RFK_FLOAT32) return narrow;
  return dtype == RFK_BFLOAT16 ? float_from_bfloat16(bfloat16_from_float(narrow))
                               : float_from_float16(float16_from_float(narrow));
}

bool same(double a, double b) { return a == b ? std::signbit(a) == std::signbit(b) : std::isnan(a) && std::isnan(b); }

struct Shape {
  std::vector<int64_t> sizes;
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
  }
  int64_t samples() const { return sizes.empty() ? 1 : sizes[0]; }
  int64_t per_sample() const { return samples() ? numel() / samples() : 0; }
};

const std::vector<std::vector<int64_t>> kShapes = {
    {},        {1},       {7},         {0, 4},       {4, 0},      {2053},     {4096},       {3, 5},       {5, 1025},
    {130, 2},  {700, 3},  {3, 1028},   {2, 8, 16},   {4, 3, 8},   {2, 3000},  {1, 5001},    {40, 64},     {3, 5, 7, 11},
    {33, 100}, {6, 784},  {2, 3, 3, 3, 3, 3}, {1, 1, 9, 1}, {64, 1}, {2, 1, 2052}, {3, 4, 1, 257}, {9, 520},
};

Shape random_shape(Dice& dice) { return {kShapes[static_cast<size_t>(dice.roll(static_cast<int>(kShapes.size())))]}; }

Ptr make(Dice& dice, int dtype, const Shape& shape, int layout) {
  Ptr tensor(new Tensor(dtype, shape.sizes, layout));
  tensor->fill(dice);
  return tensor;
}

// Half of the calls are contiguous throughout, some share one permuted layout, the others mix.
struct Layouts {
  int mode, common;
  explicit Layouts(Dice& dice) : mode(dice.roll(4)), common(dice.roll(2) ? kReversed : kSamplesOutermost) {}
  int input(Dice& dice) const { return mode < 2 ? kPlain : mode == 2 ? common : dice.roll(kLayouts); }
  int output(Dice& dice) const { return mode < 2 ? kPlain : mode == 2 ? common : dice.roll(kBroadcast); }
};

struct ScalarBox {
  rfk_scalar view = {};
  Ptr values;
  template <class C>
  C at(int64_t sample) const {
    return static_cast<C>(view.data ? values->get(view.stride ? sample : 0) : view.value);
  }
};

ScalarBox random_scalar(Dice& dice, const Shape& shape, bool per_sample) {
  ScalarBox box;
  const int kind = dice.roll(per_sample && !shape.sizes.empty() ? 3 : 2);
  box.view.value = dice.real();
  box.view.dtype = RFK_FLOAT64;
  if (kind == 0) return box;
  const int dtype = dice.roll(4), layout = kind == 2 && dice.roll(2) ? kGaps : kPlain;
  box.values.reset(new Tensor(dtype, {kind == 2 ? std::max<int64_t>(shape.samples(), 1) : 1}, layout));
  box.values->fill(dice);
  box.view.data = box.values->view.data;
  box.view.stride = kind == 2 ? box.values->view.strides[0] : 0;
  box.view.dtype = dtype;
  return box;
}

struct NoiseBox {
  rfk_noise view = {};
  std::vector<int64_t> seeds, offsets;
  int64_t elements = 1;
  float normal(int64_t logical) const {
    float z[4];
    uint32_t w[4];
    words(logical, w);
    rfk::normals_from_words(w[0], w[1], w[2], w[3], z[0], z[1], z[2], z[3]);
    return z[index(logical) % 4];
  }
  float uniform(int64_t logical, int bits) const {
    uint32_t w[4];
    words(logical, w);
    return std::ldexp(static_cast<float>(w[index(logical) % 4] >> (32 - bits)), -bits);
  }

 private:
  int64_t index(int64_t logical) const { return view.per_sample ? logical % elements : logical; }
  void words(int64_t logical, uint32_t (&w)[4]) const {
    const int64_t sample = view.per_sample ? logical / elements : 0;
    const uint64_t seed = view.seed_data ? static_cast<uint64_t>(view.seed_data[sample * view.seed_stride]) : view.seed;
    const uint64_t offset =
        view.offset_data ? static_cast<uint64_t>(view.offset_data[sample * view.offset_stride]) : view.offset;
    const uint64_t counter = static_cast<uint64_t>(index(logical)) / 4;
    w[0] = static_cast<uint32_t>(counter);
    w[1] = static_cast<uint32_t>(counter >> 32);
    w[2] = static_cast<uint32_t>(offset);
    w[3] = static_cast<uint32_t>(offset >> 32);
    rfk::philox4x32(w[0], w[1], w[2], w[3], static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
};

NoiseBox random_noise(Dice& dice, const Shape& shape) {
  NoiseBox box;
  box.elements = shape.per_sample();
  box.view.present = 1;
  box.view.seed = dice.next() >> 1;
  box.view.offset = dice.next() >> 1;
  box.view.per_sample = !shape.sizes.empty() && dice.roll(2);
  const auto column = [&](std::vector<int64_t>& values, const int64_t*& data, int64_t& stride, int kind) {
    if (kind == 0) return;
    stride = kind == 2 ? 1 : 0;
    values.resize(kind == 2 ? static_cast<size_t>(std::max<int64_t>(shape.samples(), 1)) : 1);
    for (int64_t& v : values) v = static_cast<int64_t>(dice.next() >> 1);
    data = values.data();
  };
  const int kinds = box.view.per_sample ? 3 : 2;
  column(box.seeds, box.view.seed_data, box.view.seed_stride, dice.roll(kinds));
  column(box.offsets, box.view.offset_data, box.view.offset_stride, dice.roll(kinds));
  return box;
}

// dtypes of the state, the other inputs and the copy (-1: none); the last is drawn per tensor.
struct Dtypes {
  int state, other, copy;
};

Dtypes random_dtypes(Dice& dice) {
  const int f = RFK_FLOAT32, d = RFK_FLOAT64, b = RFK_BFLOAT16, h = RFK_FLOAT16;
  const Dtypes list[] = {{f, f, -1}, {f, f, b}, {f, b, b}, {f, b, -1}, {f, h, h}, {b, b, -1}, {b, b, b}, {h, h, -1},
                         {h, h, h},  {b, f, f}, {h, b, d}, {d, d, -1}, {d, f, b}, {d, b, h},  {f, h, b}, {b, h, h}};
  return list[dice.roll(static_cast<int>(sizeof list / sizeof *list))];
}

const rfk_device kDevice = {RFK_CUDA, 1, nullptr};

// Runs call(), in both thread orders, on outputs that hold rubbish or the input they alias.
template <class Call, class Check>
void both_orders(int op, const std::string& name, bool launches, const Call& call, const Check& check) {
  for (int order = 0; order < 2; ++order) {
    emulation::descending = order == 1;
    const uint64_t before = rfk::cuda::launch_count(op);
    if (call() != RFK_OK) fail(name + ": status");
    if ((rfk::cuda::launch_count(op) > before) != launches) fail(name + ": launch count");
    if (emulation::current_device != 0 || (launches && emulation::device_of_last_launch != 1)) fail(name + ": device");
    check(name + (order ? " (descending)" : ""));
  }
}

void compare(const std::string& name, const char* what, const Tensor& got, const std::vector<double>& expected) {
  for (int64_t i = 0; i < got.numel; ++i) {
    const double want = stored(got.view.dtype, expected[static_cast<size_t>(i)]);
    if (!same(got.get(i), want)) {
      fail(name + ": " + what + "[" + std::to_string(i) + "] is " + std::to_string(got.get(i)) + ", expected " +
           std::to_string(want));
    }
  }
}

template <class C>
void step_call(Dice& dice, const Dtypes& types, const std::string& name) {
  const Shape shape = random_shape(dice);
  const Layouts layouts(dice);
  const int64_t n = shape.numel(), d = std::max<int64_t>(shape.per_sample(), 1);
  const int form = dice.roll(4);  // euler, guided, taylor, linear
  const bool per_sample = dice.roll(2);
  const int count = form == 0 ? 1 : form == 1 ? 2 : form == 2 ? 1 + dice.roll(3) : dice.roll(RFK_MAX_TERMS + 1);
  Ptr x = make(dice, types.state, shape, layouts.input(dice));
  std::vector<Ptr> terms;
  std::vector<ScalarBox> coefficients;
  rfk_tensor term_views[RFK_MAX_TERMS];
  rfk_scalar coefficient_views[RFK_MAX_TERMS];
  for (int k = 0; k < count; ++k) {
    const bool wide = types.state == RFK_FLOAT64;
    const int dtype = dice.roll(5) ? types.other : wide ? dice.roll(4) : (const int[]){0, 2, 3}[dice.roll(3)];
    terms.push_back(make(dice, dtype, shape, layouts.input(dice)));
    coefficients.push_back(random_scalar(dice, shape, per_sample));
    term_views[k] = terms.back()->view;
    coefficient_views[k] = coefficients.back().view;
  }
  const ScalarBox c0 = random_scalar(dice, shape, per_sample), scale = random_scalar(dice, shape, per_sample);
  const bool noisy = form == 3 && dice.roll(2);
  const NoiseBox noise = random_noise(dice, shape);

  std::vector<double> expected(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / d;
    const C xi = static_cast<C>(x->get(i));
    C t[RFK_MAX_TERMS] = {};
    for (int k = 0; k < count; ++k) t[k] = static_cast<C>(terms[static_cast<size_t>(k)]->get(i));
    C value;
    if (form == 1) {
      const C g = coefficients[1].at<C>(b), dt = coefficients[0].at<C>(b);
      const C w = t[1] + g * (t[0] - t[1]);
      value = xi + dt * w;
    } else if (form == 3) {
      value = c0.at<C>(b) * xi;
      for (int k = 0; k < count; ++k) value = value + coefficients[static_cast<size_t>(k)].at<C>(b) * t[k];
      if (noisy) value = value + scale.at<C>(b) * static_cast<C>(noise.normal(i));
    } else {
      const C dt = coefficients[0].at<C>(b);
      value = xi + dt * t[0];
      if (count > 1) value = value + ((dt * dt) * C(0.5)) * t[1];
      if (count > 2) value = value + (((dt * dt) * dt) * C(1.0 / 6.0)) * t[2];
    }
    expected[static_cast<size_t>(i)] = stored(types.state, static_cast<double>(value));
  }

  const bool in_place = layouts.mode < 3 && dice.roll(2);
  Tensor original(types.state, shape.sizes, kPlain);
  for (int64_t i = 0; i < n; ++i) original.put(i, x->get(i));
  Ptr fresh = make(dice, types.state, shape, layouts.output(dice));
  Tensor& out = in_place ? *x : *fresh;
  Ptr cast = types.copy < 0 ? nullptr : make(dice, types.copy, shape, layouts.output(dice));
  const rfk_tensor* copy = cast ? &cast->view : nullptr;
  both_orders(
      RFK_OP_ODE_STEP, name, n > 0,
      [&] {
        for (int64_t i = 0; i < n; ++i) x->put(i, original.get(i));
        const uint64_t before = rfk::cuda::launch_count(RFK_OP_ODE_STEP);
        rfk_status status;
        if (form == 0 || form == 1) {
          status = rfk::cuda::euler_step(kDevice, x->view, term_views[0], form ? &term_views[1] : nullptr,
                                         coefficient_views[0], form ? &coefficient_views[1] : nullptr, out.view, copy);
        } else if (form == 2) {
          status = rfk::cuda::taylor_step(kDevice, x->view, term_views, count, coefficient_views[0], out.view, copy);
        } else {
          status = rfk::cuda::linear_step(kDevice, x->view, c0.view, term_views, coefficient_views, count,
                                          noisy ? &noise.view : nullptr, noisy ? &scale.view : nullptr, out.view, copy);
        }
        if (rfk::cuda::launch_count(RFK_OP_ODE_STEP) > before + 1) fail(name + ": more than one launch");
        return status;
      },
      [&](const std::string& which) {
        compare(which, "out", out, expected);
        if (cast) compare(which, "cast", *cast, expected);
      });
}

template <class C>
void interpolate_call(Dice& dice, const Dtypes& types, const std::string& name) {
  const Shape shape = random_shape(dice);
  const Layouts layouts(dice);
  const int64_t n = shape.numel(), d = std::max<int64_t>(shape.per_sample(), 1);
  const int path = dice.roll(5);
  const bool drawn = dice.roll(2), per_sample = dice.roll(2), uniform_types = dice.roll(2);
  const int other = uniform_types || (types.other == RFK_FLOAT64 && sizeof(C) == 4) ? types.state : types.other;
  Ptr x1 = make(dice, types.state, shape, layouts.input(dice));
  Ptr x0 = drawn ? nullptr : make(dice, other, shape, layouts.input(dice));
  const NoiseBox noise = random_noise(dice, shape);
  ScalarBox t = random_scalar(dice, shape, per_sample);
  t.view.value = std::fabs(t.view.value) / 2;
  for (int64_t i = 0; t.values && i < t.values->numel; ++i) t.values->put(i, std::fabs(t.values->get(i)) / 2.0);
  rfk_scalar custom[4];
  std::vector<ScalarBox> given;
  for (int k = 0; k < 4; ++k) {
    given.push_back(random_scalar(dice, shape, per_sample));
    custom[k] = given.back().view;
  }
  std::vector<double> point(static_cast<size_t>(n)), target(point), source(point);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / d;
    rfk::PathCoefficients p{};
    C c[4];
    if (path != RFK_PATH_CUSTOM) p = rfk::path_coefficients(path, static_cast<double>(t.at<C>(b)));
    const double values[4] = {p.alpha, p.sigma, p.dalpha, p.dsigma};
    for (size_t k = 0; k < 4; ++k) c[k] = path == RFK_PATH_CUSTOM ? given[k].at<C>(b) : static_cast<C>(values[k]);
    const C a = static_cast<C>(x1->get(i)), z = static_cast<C>(drawn ? noise.normal(i) : x0->get(i));
    const C left = c[1] * z, right = c[0] * a, dleft = c[3] * z, dright = c[2] * a;
    point[static_cast<size_t>(i)] = static_cast<double>(left + right);
    target[static_cast<size_t>(i)] = static_cast<double>(dleft + dright);
    source[static_cast<size_t>(i)] = static_cast<double>(z);
  }
  Ptr xt = make(dice, types.state, shape, layouts.output(dice));
  Ptr velocity = make(dice, types.state, shape, layouts.output(dice));
  Ptr x0_out = dice.roll(2) ? make(dice, types.state, shape, layouts.output(dice)) : nullptr;
  both_orders(
      RFK_OP_INTERPOLATE, name, n > 0,
      [&] {
        return rfk::cuda::interpolate(kDevice, x1->view, x0 ? &x0->view : nullptr, drawn ? &noise.view : nullptr, t.view,
                                      path, custom, xt->view, velocity->view, x0_out ? &x0_out->view : nullptr);
      },
      [&](const std::string& which) {
        compare(which, "xt", *xt, point);
        compare(which, "target", *velocity, target);
        if (x0_out) compare(which, "x0", *x0_out, source);
      });
}

double resolution(int dtype) {
  return dtype == RFK_FLOAT64 ? 0x1p-52 : dtype == RFK_FLOAT32 ? 0x1p-23 : dtype == RFK_BFLOAT16 ? 0x1p-7 : 0x1p-10;
}

const std::vector<std::vector<int64_t>> kLossShapes = {
    {3, 4096}, {2, 9000}, {1, 20001}, {3, 4100}, {2, 4097}, {64, 2},     {300, 3},      {5, 784}, {4, 16, 16, 3}, {3, 0},
    {0, 4},    {7},       {2, 8192},  {4, 260},  {3, 255},  {2, 40, 33}, {1, 64, 3, 3}, {9, 17},  {2, 2, 2, 1030}};

template <class C>
void loss_call(Dice& dice, const Dtypes& types, const std::string& name) {
  const Shape shape = {kLossShapes[static_cast<size_t>(dice.roll(static_cast<int>(kLossShapes.size())))]};
  const Layouts layouts(dice);
  const int64_t n = shape.numel(), samples = shape.samples(), d = shape.per_sample();
  const int kind = dice.roll(3), source = dice.roll(3);  // target, x0 and x1, drawn
  const bool weighted = dice.roll(2), with_grad = dice.roll(4) != 0;
  const double c = std::fabs(dice.real()) + 0.01, grad_scale = dice.real();
  const int other = types.other == RFK_FLOAT64 && sizeof(C) == 4 ? types.state : types.other;
  Ptr prediction = make(dice, types.state, shape, layouts.input(dice));
  Ptr target = make(dice, other, shape, layouts.input(dice));  // or x1
  Ptr x0 = make(dice, dice.roll(3) ? other : types.state, shape, layouts.input(dice));
  const NoiseBox noise = random_noise(dice, shape);
  const ScalarBox weight = random_scalar(dice, shape, true);
  const int64_t poisoned = samples > 1 && d > 0 && dice.roll(3) == 0 ? dice.roll(static_cast<int>(samples)) : -1;
  if (poisoned >= 0) prediction->put(poisoned * d + dice.roll(static_cast<int>(d)), NAN);

  std::vector<C> r(static_cast<size_t>(n));
  std::vector<double> sums(static_cast<size_t>(samples)), gradient(static_cast<size_t>(n));
  const C cc = static_cast<C>(c);
  for (int64_t i = 0; i < n; ++i) {
    C goal = static_cast<C>(target->get(i));
    if (source > 0) goal = goal - static_cast<C>(source == 1 ? x0->get(i) : static_cast<double>(noise.normal(i)));
    const C ri = static_cast<C>(prediction->get(i)) - goal;
    r[static_cast<size_t>(i)] = ri;
    const double wide = static_cast<double>(ri);
    sums[static_cast<size_t>(i / d)] +=
        kind == RFK_LOSS_PSEUDO_HUBER_ELEMENTWISE ? static_cast<double>(std::sqrt(ri * ri + cc * cc) - cc) : wide * wide;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / d;
    const C ri = r[static_cast<size_t>(i)], count = static_cast<C>(d);
    const C scale = (weighted ? weight.at<C>(b) : C(1)) * static_cast<C>(grad_scale);
    C value;
    if (kind == RFK_LOSS_MSE) {
      value = ri * ((C(2) / count) * scale);
    } else if (kind == RFK_LOSS_PSEUDO_HUBER) {
      const double norm = std::sqrt(sums[static_cast<size_t>(b)] + c * c);
      value = ri * (static_cast<C>(1.0 / (static_cast<double>(d) * norm)) * scale);
    } else {
      value = (ri / std::sqrt(ri * ri + cc * cc)) * (scale / count);
    }
    gradient[static_cast<size_t>(i)] = static_cast<double>(value);
  }

  const bool in_place = with_grad && layouts.mode < 3 && dice.roll(2);
  Tensor original(types.state, shape.sizes, kPlain);
  for (int64_t i = 0; i < n; ++i) original.put(i, prediction->get(i));
  Ptr fresh = make(dice, types.state, shape, layouts.output(dice));
  Tensor& grad = in_place ? *prediction : *fresh;
  Tensor losses(sizeof(C) == 8 ? RFK_FLOAT64 : RFK_FLOAT32, {samples}, kPlain);
  const int64_t entries = samples * ((d + RFK_LOSS_BLOCK - 1) / RFK_LOSS_BLOCK);
  std::unique_ptr<double[]> workspace(new double[static_cast<size_t>(entries)]);
  both_orders(
      RFK_OP_FLOW_LOSS, name, samples > 0,
      [&] {
        for (int64_t i = 0; i < n; ++i) prediction->put(i, original.get(i));
        return rfk::cuda::flow_loss(kDevice, prediction->view, source == 0 ? &target->view : nullptr,
                                    source == 1 ? &x0->view : nullptr, source ? &target->view : nullptr,
                                    source == 2 ? &noise.view : nullptr, weighted ? &weight.view : nullptr, kind, c,
                                    grad_scale, losses.view, with_grad ? &grad.view : nullptr, workspace.get());
      },
      [&](const std::string& which) {
        for (int64_t b = 0; b < samples; ++b) {
          // A sample without elements has the mean over nothing, NaN.
          const double count = static_cast<double>(d), sum = sums[static_cast<size_t>(b)];
          const double want = kind == RFK_LOSS_PSEUDO_HUBER ? (std::sqrt(sum + c * c) - c) / count : sum / count;
          const double got = losses.get(b);
          // Sixteen rounded squares and as many sums a thread, and one rounding of the result.
          const double bound = 20 * resolution(losses.view.dtype) * (std::fabs(want) + c / count);
          if (!(std::fabs(got - want) <= bound) && !(std::isnan(got) && std::isnan(want))) {
            fail(which + ": loss " + std::to_string(b) + " is " + std::to_string(got) + ", expected " +
                 std::to_string(want));
          }
          if (std::isnan(got) != (d == 0 || b == poisoned)) fail(which + ": NaN outside its sample");
        }
        if (!with_grad) return;
        if (kind != RFK_LOSS_PSEUDO_HUBER) return compare(which, "grad", grad, gradient);
        for (int64_t i = 0; i < n; ++i) {
          const double want = stored(types.state, gradient[static_cast<size_t>(i)]), got = grad.get(i);
          const double bound = (resolution(types.state) + 24 * resolution(losses.view.dtype)) * std::fabs(want);
          const bool tiny = std::fabs(got - want) <= 0x1p-24 && types.state == RFK_FLOAT16;  // subnormal float16
          if (!(std::fabs(got - want) <= bound) && !tiny && !(std::isnan(got) && std::isnan(want))) {
            fail(which + ": grad[" + std::to_string(i) + "] is " + std::to_string(got) + ", expected " +
                 std::to_string(want));
          }
        }
      });
}

void random_call(Dice& dice, const Dtypes& types, const std::string& name) {
  const Shape shape = random_shape(dice);
  const Layouts layouts(dice);
  const NoiseBox noise = random_noise(dice, shape);
  const int distribution = dice.roll(2);
  Ptr out = make(dice, types.state, shape, layouts.output(dice));
  const int bits = types.state == RFK_BFLOAT16 ? 8 : types.state == RFK_FLOAT16 ? 11 : 24;
  std::vector<double> expected;
  for (int64_t i = 0; i < out->numel; ++i) {
    expected.push_back(distribution == RFK_NORMAL ? noise.normal(i) : noise.uniform(i, bits));
  }
  both_orders(
      RFK_OP_RANDOM, name, out->numel > 0,
      [&] { return rfk::cuda::random(kDevice, noise.view, distribution, out->view); },
      [&](const std::string& which) { compare(which, "out", *out, expected); });
}

// The emulated conversions against the CPU kernels' own.
void check_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    if (!same(emulation::half_to_float(half), float_from_float16(half))) fail("half_to_float");
  }
  Dice dice = {7};
  for (int i = 0; i < 400000; ++i) {
    float value = rfk::float_from_bits(static_cast<uint32_t>(dice.next()));
    if (i % 2) value = std::ldexp(static_cast<float>(dice.real()), dice.roll(48) - 30);
    if (!same(float_from_float16(emulation::float_to_half(value)), float_from_float16(float16_from_float(value))) ||
        !same(float_from_bfloat16(emulation::float_to_bfloat16(value)), float_from_bfloat16(bfloat16_from_float(value)))) {
      fail("conversion of " + std::to_string(value));
    }
  }
}

void check_bad_device() {
  const rfk_device absent = {RFK_CUDA, 7, nullptr};
  Tensor out(RFK_FLOAT32, {4}, kPlain);
  rfk_noise noise = {};
  if (rfk::cuda::random(absent, noise, RFK_NORMAL, out.view) != RFK_CUDA_ERROR) fail("an absent device must be an error");
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 150;
  const int first = argc > 2 ? std::atoi(argv[2]) : 1;
  check_conversions();
  check_bad_device();
  const char* ops[] = {"step", "interpolate", "flow_loss", "random"};
  for (int op = 0; op < 4; ++op) {
    for (int seed = first; seed < first + calls; ++seed) {
      Dice dice = {static_cast<uint64_t>(seed) * 4 + static_cast<uint64_t>(op)};
      const Dtypes types = random_dtypes(dice);
      const bool wide = types.state == RFK_FLOAT64;
      const std::string name = std::string(ops[op]) + " seed " + std::to_string(seed);
      if (op == 0) wide ? step_call<double>(dice, types, name) : step_call<float>(dice, types, name);
      if (op == 1) wide ? interpolate_call<double>(dice, types, name) : interpolate_call<float>(dice, types, name);
      if (op == 2) wide ? loss_call<double>(dice, types, name) : loss_call<float>(dice, types, name);
      if (op == 3) random_call(dice, types, name);
    }
    std::printf("%s: %d calls\n", ops[op], calls);
  }
  return 0;
}
