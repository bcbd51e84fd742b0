// core_test.cpp: invalid arguments are refused with a sentence and write nothing; levels, counters and number formats.
#include <functional>
#include <string>

#include "checks.h"

using namespace rfk_test;

namespace {

const rfk_scalar kOne{1.0, nullptr, 0, RFK_FLOAT64};

void refused(const char* part, const std::function<rfk_status()>& call) {
  CHECK(call() == RFK_INVALID, "accepted what should say '%s'", part);
  CHECK(std::string(rfk_last_error()).find(part) != std::string::npos, "'%s' is not in '%s'", part, rfk_last_error());
}

void invalid_arguments() {
  const std::vector<int64_t> shape = {3, 5};
  Tensor x(RFK_FLOAT32, shape, kDense), v(RFK_FLOAT32, shape, kDense), out(RFK_FLOAT32, shape, kDense);
  Tensor other(RFK_FLOAT32, {3, 4}, kDense), flat(RFK_FLOAT32, {15}, kDense), half(RFK_FLOAT16, shape, kDense);
  Tensor losses(RFK_FLOAT32, {3}, kDense), doubles(RFK_FLOAT64, {3}, kDense), broadcast(RFK_FLOAT32, shape, kBroadcast);
  const rfk_scalar dt{0.5, nullptr, 0, RFK_FLOAT64}, odd{0.5, x.view()->data, 0, 9};
  const rfk_device nowhere{7, 0, nullptr};
  const rfk_noise noise{1, 0, nullptr, nullptr, 0, 0, 0, 1}, none{};
  double workspace[8];
  const std::vector<char> before = out.memory();
  const auto euler = [&](const rfk_tensor* a, const rfk_tensor* b, const rfk_tensor* o, const rfk_tensor* cast = nullptr) {
    return rfk_euler_step(&kCpuDevice, a, b, nullptr, &dt, nullptr, o, cast);
  };
  refused("x is missing", [&] { return euler(nullptr, v.view(), out.view()); });
  refused("v is missing", [&] { return euler(x.view(), nullptr, out.view()); });
  refused("out is missing", [&] { return euler(x.view(), v.view(), nullptr); });
  refused("v must have the shape", [&] { return euler(x.view(), other.view(), out.view()); });
  refused("v must have the shape", [&] { return euler(x.view(), flat.view(), out.view()); });
  refused("out must have the dtype", [&] { return euler(x.view(), v.view(), half.view()); });
  refused("out must have memory of its own", [&] { return euler(x.view(), v.view(), broadcast.view()); });
  refused("cast must have the shape", [&] { return euler(x.view(), v.view(), out.view(), other.view()); });
  refused("device", [&] {
    return rfk_euler_step(&nowhere, x.view(), v.view(), nullptr, &dt, nullptr, out.view(), nullptr);
  });
  refused("device", [&] {
    return rfk_euler_step(nullptr, x.view(), v.view(), nullptr, &dt, nullptr, out.view(), nullptr);
  });
  refused("dt must be", [&] {
    return rfk_euler_step(&kCpuDevice, x.view(), v.view(), nullptr, nullptr, nullptr, out.view(), nullptr);
  });
  refused("dt must be", [&] {
    return rfk_euler_step(&kCpuDevice, x.view(), v.view(), nullptr, &odd, nullptr, out.view(), nullptr);
  });
  refused("guidance_scale must be", [&] {
    return rfk_euler_step(&kCpuDevice, x.view(), v.view(), v.view(), &dt, nullptr, out.view(), nullptr);
  });
  rfk_tensor broken = *x.view();
  broken.dtype = 17;
  refused("x must be float32, float64, bfloat16 or float16; got dtype 17", [&] { return euler(&broken, v.view(), out.view()); });
  broken = *x.view();
  broken.ndim = 17;
  refused("at most 16 dimensions; got 17", [&] { return euler(&broken, v.view(), out.view()); });
  broken = *x.view();
  broken.data = nullptr;
  refused("x has elements but no memory", [&] { return euler(&broken, v.view(), out.view()); });
  broken = *x.view();
  broken.shape[1] = -5;
  refused("x has a negative size", [&] { return euler(&broken, v.view(), out.view()); });
  refused("the order must be 1 to 3; got 4", [&] {
    return rfk_taylor_step(&kCpuDevice, x.view(), v.view(), 4, &dt, out.view(), nullptr);
  });
  refused("at most 8 tensors; got 9", [&] {
    return rfk_linear_step(&kCpuDevice, x.view(), &dt, v.view(), &dt, 9, nullptr, nullptr, out.view(), nullptr);
  });
  refused("noise_scale must be", [&] {
    return rfk_linear_step(&kCpuDevice, x.view(), &dt, v.view(), &dt, 1, &noise, nullptr, out.view(), nullptr);
  });
  refused("x0 or noise must be given", [&] {
    return rfk_interpolate(&kCpuDevice, x.view(), nullptr, &none, &dt, 0, nullptr, out.view(), v.view(), nullptr);
  });
  refused("unknown path 5", [&] {
    return rfk_interpolate(&kCpuDevice, x.view(), nullptr, &noise, &dt, 5, nullptr, out.view(), v.view(), nullptr);
  });
  refused("four coefficients", [&] {
    return rfk_interpolate(&kCpuDevice, x.view(), nullptr, &noise, &dt, RFK_PATH_CUSTOM, nullptr, out.view(), v.view(),
                           nullptr);
  });
  const auto loss = [&](const rfk_tensor* target, const rfk_tensor* x1, int kind, const rfk_tensor* where, double* space) {
    return rfk_flow_loss(&kCpuDevice, x.view(), target, nullptr, x1, &none, nullptr, kind, 1.0, 1.0, where, nullptr, space);
  };
  refused("the target, or x1", [&] { return loss(nullptr, nullptr, 0, losses.view(), workspace); });
  refused("the target, or x1", [&] { return loss(nullptr, v.view(), 0, losses.view(), workspace); });
  refused("unknown kind 3", [&] { return loss(v.view(), nullptr, 3, losses.view(), workspace); });
  refused("losses must be one value per sample", [&] { return loss(v.view(), nullptr, 0, doubles.view(), workspace); });
  refused("losses must be one value per sample", [&] { return loss(v.view(), nullptr, 0, flat.view(), workspace); });
  refused("workspace", [&] { return loss(v.view(), nullptr, 0, losses.view(), nullptr); });
  refused("a seed and a known distribution", [&] { return rfk_random(&kCpuDevice, &noise, 2, out.view()); });
  refused("a seed and a known distribution", [&] { return rfk_random(&kCpuDevice, nullptr, 0, out.view()); });
  refused("isa level must be 0 to 3; got 4", [] { return rfk_isa_cap(4); });
  if (!rfk_has_cuda()) {
    const rfk_device gpu{RFK_CUDA, 0, nullptr};
    refused("no CUDA kernels", [&] { return rfk_random(&gpu, &noise, 0, out.view()); });
  }
  CHECK(out.memory() == before, "a refused call wrote something");
}

void levels_and_counters() {
  CHECK(rfk_isa_compiled(RFK_ISA_BASELINE) == 1 && rfk_isa_compiled(RFK_ISA_AMX) == rfk_isa_compiled(RFK_ISA_AVX512) && rfk_isa_compiled(-1) == 0, "levels");
  CHECK(rfk_launch_count(RFK_OP_COUNT, 0) == 0 && rfk_launch_count(-1, 0) == 0 && rfk_launch_count(0, 99) == 0, "counters");
  CHECK(rfk_flow_loss_workspace(3, 4097) == 6 && rfk_flow_loss_workspace(0, 5) == 0 && rfk_flow_loss_workspace(2, 0) == 0,
        "workspace");
  CHECK(rfk_max_threads() >= 1, "threads");
}

// Every half and 200 000 floats through a scaling by one: the stored bits are those of the definition.
void number_formats() {
  for (int dtype : {RFK_BFLOAT16, RFK_FLOAT16}) {
    Tensor all(dtype, {65536}, kDense), wide(RFK_FLOAT32, {65536}, kDense);
    for (int64_t i = 0; i < 65536; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i);
      std::memcpy(all.place(i), &bits, 2);
    }
    at_every_level(RFK_OP_ODE_STEP, [&](const char* level) {
      Tensor out(dtype, {65536}, kGaps);
      CHECK(rfk_linear_step(&kCpuDevice, all.view(), &kOne, nullptr, nullptr, 0, nullptr, nullptr, out.view(), wide.view()) ==
                RFK_OK, "%s", rfk_last_error());
      for (int64_t i = 0; i < 65536; ++i) {
        CHECK(same(out.get(i), all.get(i)), "half %04llx at %s", static_cast<unsigned long long>(i), level);
        CHECK(same(wide.get(i), all.get(i)), "half %04llx widened at %s", static_cast<unsigned long long>(i), level);
      }
    });
    Dice dice{9};
    Tensor floats(RFK_FLOAT32, {200001}, kDense);
    for (int64_t i = 0; i < floats.numel(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(dice.next());
      std::memcpy(floats.place(i), &bits, 4);
    }
    at_every_level(RFK_OP_ODE_STEP, [&](const char* level) {
      Tensor same_bits(RFK_FLOAT32, {200001}, kDense), narrow(dtype, {200001}, kDense);
      CHECK(rfk_linear_step(&kCpuDevice, floats.view(), &kOne, nullptr, nullptr, 0, nullptr, nullptr, same_bits.view(),
                            narrow.view()) == RFK_OK, "%s", rfk_last_error());
      for (int64_t i = 0; i < floats.numel(); ++i) {
        CHECK(same(narrow.get(i), stored(dtype, floats.get(i))), "%.9g becomes %.9g in dtype %d at %s", floats.get(i),
              narrow.get(i), dtype, level);
      }
    });
  }
}

}  // namespace

int main() {
  invalid_arguments();
  levels_and_counters();
  number_formats();
  std::puts("core: passed");
  return 0;
}
