// interpolate_test.cpp: random interpolations at every level, bit for bit against loops over elements.
#include <memory>

#include "checks.h"
#include "rfk/paths.h"

using namespace rfk_test;

namespace {

template <class C>
void one(Dice& dice, int dtype) {
  const std::vector<int64_t> shape = some_shape(dice);
  const bool special = dice.roll(4) == 0, drawn = dice.roll(2) == 0, returned = dice.roll(2) == 0;
  const int path = dice.roll(5), low = dice.roll(4);
  Tensor x1(dtype, shape, dice.roll(kLayouts));
  Tensor x0(low == RFK_FLOAT64 && dtype != RFK_FLOAT64 ? RFK_FLOAT32 : low, shape, dice.roll(kLayouts));
  x1.fill(dice, special);
  x0.fill(dice, special);
  const Noise noise(dice, x1.batch());
  const Scalar t(dice, x1.batch());
  std::vector<std::unique_ptr<Scalar>> custom;
  rfk_scalar custom_views[4];
  for (auto& view : custom_views) {
    custom.push_back(std::make_unique<Scalar>(dice, x1.batch()));
    view = custom.back()->view;
  }
  const int layouts[3] = {dice.roll(kOutputLayouts), dice.roll(kOutputLayouts), dice.roll(kOutputLayouts)};
  at_every_level(RFK_OP_INTERPOLATE, [&](const char* level) {
    Tensor xt(dtype, shape, layouts[0]), target(dtype, shape, layouts[1]), source(dtype, shape, layouts[2]);
    CHECK(rfk_interpolate(&kCpuDevice, x1.view(), drawn ? nullptr : x0.view(), &noise.view, &t.view, path, custom_views,
                          xt.view(), target.view(), returned ? source.view() : nullptr) == RFK_OK,
          "%s", rfk_last_error());
    for (int64_t i = 0; i < x1.numel(); ++i) {
      const int64_t sample = i / x1.per_sample();
      C c[4];
      if (path == RFK_PATH_CUSTOM) {
        for (size_t k = 0; k < 4; ++k) c[k] = custom[k]->at<C>(sample);
      } else {
        const rfk::PathCoefficients p = rfk::path_coefficients(path, static_cast<double>(t.at<C>(sample)));
        const double values[4] = {p.alpha, p.sigma, p.dalpha, p.dsigma};
        for (int k = 0; k < 4; ++k) c[k] = static_cast<C>(values[k]);
      }
      const C data = static_cast<C>(x1.get(i));
      const C begin = drawn ? static_cast<C>(noise.normal(i, x1.per_sample())) : static_cast<C>(x0.get(i));
      const C point = c[1] * begin + c[0] * data, direction = c[3] * begin + c[2] * data;
      CHECK(same(xt.get(i), stored(dtype, static_cast<double>(point))), "x_t, path %d, %s, %.17g", path, level, xt.get(i));
      CHECK(same(target.get(i), stored(dtype, static_cast<double>(direction))), "target, path %d, %s", path, level);
      if (returned) CHECK(same(source.get(i), stored(dtype, static_cast<double>(begin))), "x0, %s", level);
    }
    CHECK(xt.gaps_untouched() && target.gaps_untouched(), "memory between the elements, %s", level);
  });
}

}  // namespace

int main(int argc, char** argv) {
  Dice dice{2};
  for (int round = 0; round < rounds(argc, argv); ++round) {
    for (int dtype : {RFK_FLOAT32, RFK_FLOAT64, RFK_BFLOAT16, RFK_FLOAT16}) {
      if (dtype == RFK_FLOAT64) {
        one<double>(dice, dtype);
      } else {
        one<float>(dice, dtype);
      }
    }
  }
  std::puts("interpolate: passed");
  return 0;
}
