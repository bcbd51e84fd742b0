// ode_step_test.cpp: random Euler, guided, Taylor and linear steps at every level, bit for bit against loops over elements.
#include <memory>

#include "checks.h"

using namespace rfk_test;

namespace {

template <class C>
struct Case {
  Dice& dice;
  std::vector<int64_t> shape;
  int form;  // 0 Euler, 1 guided, 2 Taylor, 3 linear
  std::unique_ptr<Tensor> x;
  std::vector<std::unique_ptr<Tensor>> terms;
  std::vector<std::unique_ptr<Scalar>> scalars;  // linear: x, terms, noise
  std::unique_ptr<Noise> noise;

  C expected(int64_t i) const {
    const int64_t sample = x->per_sample() > 0 ? i / x->per_sample() : 0;
    const C xi = static_cast<C>(x->get(i));
    const auto term = [&](size_t k) { return static_cast<C>(terms[k]->get(i)); };
    const auto scalar = [&](size_t k) { return scalars[k]->template at<C>(sample); };
    if (form == 0) return xi + scalar(0) * term(0);
    if (form == 1) {
      const C difference = term(0) - term(1), w = term(1) + scalar(1) * difference;
      return xi + scalar(0) * w;
    }
    if (form == 2) {
      const C dt = scalar(0);
      C sum = xi + dt * term(0);
      if (terms.size() > 1) sum = sum + (dt * dt) * C(0.5) * term(1);
      if (terms.size() > 2) sum = sum + ((dt * dt) * dt) * C(1.0 / 6.0) * term(2);
      return sum;
    }
    C sum = scalar(0) * xi;
    for (size_t k = 0; k < terms.size(); ++k) sum = sum + scalar(k + 1) * term(k);
    if (noise) sum = sum + scalar(terms.size() + 1) * static_cast<C>(noise->normal(i, x->per_sample()));
    return sum;
  }

  rfk_status run(const rfk_tensor* out, const rfk_tensor* cast) const {
    std::vector<rfk_tensor> views;
    std::vector<rfk_scalar> factors;
    for (const auto& t : terms) views.push_back(*t->view());
    for (size_t k = 0; k < scalars.size(); ++k) factors.push_back(scalars[k]->view);
    if (form == 0) return rfk_euler_step(&kCpuDevice, x->view(), &views[0], nullptr, &factors[0], nullptr, out, cast);
    if (form == 1) {
      return rfk_euler_step(&kCpuDevice, x->view(), &views[0], &views[1], &factors[0], &factors[1], out, cast);
    }
    if (form == 2) {
      return rfk_taylor_step(&kCpuDevice, x->view(), views.data(), static_cast<int32_t>(views.size()), &factors[0], out,
                             cast);
    }
    return rfk_linear_step(&kCpuDevice, x->view(), &factors[0], views.data(), factors.data() + 1,
                           static_cast<int32_t>(views.size()), noise ? &noise->view : nullptr, &factors.back(), out, cast);
  }
};

template <class C>
void one(Dice& dice, int dtype) {
  Case<C> c{dice, some_shape(dice), dice.roll(4), nullptr, {}, {}, nullptr};
  const bool special = dice.roll(3) == 0;
  c.x = std::make_unique<Tensor>(dtype, c.shape, dice.roll(kLayouts));
  c.x->fill(dice, special);
  const int count = c.form == 0 ? 1 : c.form == 1 ? 2 : c.form == 2 ? 1 + dice.roll(3) : dice.roll(9);
  for (int k = 0; k < count; ++k) {
    const int low = dice.roll(4);
    const int term = low == RFK_FLOAT64 && dtype != RFK_FLOAT64 ? RFK_FLOAT32 : low;
    c.terms.push_back(std::make_unique<Tensor>(term, c.shape, dice.roll(kLayouts)));
    c.terms.back()->fill(dice, special);
  }
  for (int k = 0; k < count + 2; ++k) c.scalars.push_back(std::make_unique<Scalar>(dice, c.x->batch()));
  if (c.form == 3 && dice.roll(2) == 0) c.noise = std::make_unique<Noise>(dice, c.x->batch());
  std::vector<double> truth;
  for (int64_t i = 0; i < c.x->numel(); ++i) truth.push_back(stored(dtype, static_cast<double>(c.expected(i))));
  const int layout = dice.roll(kOutputLayouts), cast_dtype = dice.roll(5);
  at_every_level(RFK_OP_ODE_STEP, [&](const char* level) {
    Tensor out(dtype, c.shape, layout), cast(cast_dtype % 4, c.shape, dice.roll(kOutputLayouts));
    const bool copied = cast_dtype < 4;
    CHECK(c.run(out.view(), copied ? cast.view() : nullptr) == RFK_OK, "%s", rfk_last_error());
    for (int64_t i = 0; i < out.numel(); ++i) {
      CHECK(same(out.get(i), truth[static_cast<size_t>(i)]), "form %d, %s, dtype %d, element %lld: %.17g, expected %.17g",
            c.form, level, dtype, static_cast<long long>(i), out.get(i), truth[static_cast<size_t>(i)]);
      if (copied) CHECK(same(cast.get(i), stored(cast.dtype(), out.get(i))), "cast, %s", level);
    }
    CHECK(out.gaps_untouched() && (!copied || cast.gaps_untouched()), "memory between the elements, %s", level);
  });
}

// out may be x or a term.
void in_place(Dice& dice) {
  for (int target = 0; target < 3; ++target) {
    at_every_level(RFK_OP_ODE_STEP, [&](const char* level) {
      const std::vector<int64_t> shape = {3, 1030};
      Tensor x(RFK_FLOAT32, shape, kGaps), v(RFK_FLOAT32, shape, kGaps), u(RFK_FLOAT32, shape, kGaps);
      for (Tensor* t : {&x, &v, &u}) t->fill(dice, false);
      std::vector<float> truth;
      const float dt = 0.1f, g = 3.0f;
      for (int64_t i = 0; i < x.numel(); ++i) {
        const float a = static_cast<float>(x.get(i)), b = static_cast<float>(v.get(i)), w = static_cast<float>(u.get(i));
        const float guided = w + g * (b - w);
        truth.push_back(a + dt * guided);
      }
      const Tensor& out = target == 0 ? x : target == 1 ? v : u;
      const rfk_scalar step{0.1, nullptr, 0, RFK_FLOAT64}, scale{3.0, nullptr, 0, RFK_FLOAT64};
      CHECK(rfk_euler_step(&kCpuDevice, x.view(), v.view(), u.view(), &step, &scale, out.view(), nullptr) == RFK_OK, "%s",
            rfk_last_error());
      for (int64_t i = 0; i < x.numel(); ++i) {
        CHECK(out.get(i) == static_cast<double>(truth[static_cast<size_t>(i)]), "in place %d at %s", target, level);
      }
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  Dice dice{1};
  for (int round = 0; round < rounds(argc, argv); ++round) {
    for (int dtype : {RFK_FLOAT32, RFK_FLOAT64, RFK_BFLOAT16, RFK_FLOAT16}) {
      if (dtype == RFK_FLOAT64) {
        one<double>(dice, dtype);
      } else {
        one<float>(dice, dtype);
      }
    }
  }
  in_place(dice);
  std::puts("ode_step: passed");
  return 0;
}
