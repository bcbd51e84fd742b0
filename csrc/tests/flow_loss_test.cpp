// flow_loss_test.cpp: random losses and gradients at every level against the formulas in double; the levels agree in bits.
#include <memory>

#include "checks.h"

using namespace rfk_test;

namespace {

template <class C>
void one(Dice& dice, int dtype) {
  std::vector<int64_t> shape = some_shape(dice);
  if (shape.empty()) shape = {3, 4097};
  const int kind = dice.roll(3), source = dice.roll(3);  // target; x1 and x0; x1 and noise
  Tensor p(dtype, shape, dice.roll(kLayouts)), a(dtype, shape, dice.roll(kLayouts)), b(dtype, shape, dice.roll(kLayouts));
  for (Tensor* t : {&p, &a, &b}) t->fill(dice, false);
  const Noise noise(dice, p.batch());
  const Scalar weight(dice, p.batch());
  const bool weighted = dice.roll(2) == 0, with_grad = dice.roll(4) != 0;
  const int64_t d = p.per_sample();
  const double c = 0.25, scale = 0.125, unit = dtype == RFK_FLOAT64 ? 0x1p-53 : 0x1p-24;
  std::vector<double> first_losses, first_grads;
  const int grad_layout = dice.roll(kOutputLayouts);
  at_every_level(RFK_OP_FLOW_LOSS, [&](const char* level) {
    Tensor losses(dtype == RFK_FLOAT64 ? RFK_FLOAT64 : RFK_FLOAT32, {p.batch()}, kGaps), grad(dtype, shape, grad_layout);
    std::vector<double> workspace(static_cast<size_t>(rfk_flow_loss_workspace(p.batch(), d)));
    CHECK(rfk_flow_loss(&kCpuDevice, p.view(), source == 0 ? a.view() : nullptr, source == 1 ? b.view() : nullptr,
                        source == 0 ? nullptr : a.view(), &noise.view, weighted ? &weight.view : nullptr, kind, c, scale,
                        losses.view(), with_grad ? grad.view() : nullptr, workspace.data()) == RFK_OK,
          "%s", rfk_last_error());
    std::vector<double> found_losses, found_grads;
    for (int64_t sample = 0; sample < p.batch(); ++sample) {
      double squares = 0, roots = 0;
      std::vector<double> r(static_cast<size_t>(d));
      for (int64_t k = 0; k < d; ++k) {
        const int64_t i = sample * d + k;
        const double x0 = source == 1 ? b.get(i) : source == 2 ? static_cast<double>(noise.normal(i, d)) : 0.0;
        const double value = p.get(i) - (a.get(i) - x0);
        r[static_cast<size_t>(k)] = value;
        squares += value * value;
        roots += std::sqrt(value * value + c * c) - c;
      }
      const double n = static_cast<double>(d), norm = std::sqrt(squares + c * c);
      const double loss = kind == RFK_LOSS_MSE ? squares / n : kind == RFK_LOSS_PSEUDO_HUBER ? (norm - c) / n : roots / n;
      const double got = losses.get(sample);
      found_losses.push_back(got);
      if (d == 0) {
        CHECK(std::isnan(got), "an empty sample has no mean, %s", level);
        continue;
      }
      // At most 256 additions a lane and a few roundings, all relative to values of at most 12 in size.
      const double size = kind == RFK_LOSS_MSE ? 144.0 : 13.0;
      CHECK(std::fabs(got - loss) <= 300 * unit * size, "loss, kind %d, %s: %.17g, expected %.17g", kind, level, got, loss);
      if (!with_grad) continue;
      const double factor = scale * (weighted ? static_cast<double>(weight.at<C>(sample)) : 1.0);
      for (int64_t k = 0; k < d; ++k) {
        const double value = r[static_cast<size_t>(k)];
        const double slope = kind == RFK_LOSS_MSE            ? 2.0 * value / n
                             : kind == RFK_LOSS_PSEUDO_HUBER ? value / (n * norm)
                                                             : value / std::sqrt(value * value + c * c) / n;
        const double truth = slope * factor, actual = grad.get(sample * d + k);
        // The residual itself errs by one rounding of up to 12, whose slope is at most 2 / n or 1 / (c n).
        const double coarse = dtype == RFK_BFLOAT16 ? 0x1p-8 : dtype == RFK_FLOAT16 ? 0x1p-11 : unit;
        const double smallest = dtype == RFK_FLOAT16 ? 0x1p-24 : 0.0;
        const double bound = 24 * unit * 12 * 4 / n * std::fabs(factor) + 4 * coarse * std::fabs(truth) + smallest;
        CHECK(std::fabs(actual - truth) <= bound, "gradient, kind %d, %s: %.17g, expected %.17g", kind, level, actual, truth);
        found_grads.push_back(actual);
      }
    }
    CHECK(losses.gaps_untouched() && grad.gaps_untouched(), "memory between the elements, %s", level);
    if (first_losses.empty()) {
      first_losses = found_losses;
      first_grads = found_grads;
    }
    for (size_t k = 0; k < found_losses.size(); ++k) CHECK(same(found_losses[k], first_losses[k]), "levels differ: %s", level);
    for (size_t k = 0; k < found_grads.size(); ++k) CHECK(same(found_grads[k], first_grads[k]), "levels differ: %s", level);
  });
}

}  // namespace

int main(int argc, char** argv) {
  Dice dice{4};
  for (int round = 0; round < rounds(argc, argv); ++round) {
    for (int dtype : {RFK_FLOAT32, RFK_FLOAT64, RFK_BFLOAT16, RFK_FLOAT16}) {
      if (dtype == RFK_FLOAT64) {
        one<double>(dice, dtype);
      } else {
        one<float>(dice, dtype);
      }
    }
  }
  std::puts("flow_loss: passed");
  return 0;
}
