// dispatch.cpp: the C ABI. Validates arguments, so that no kernel is ever given something it would read out of bounds,
// then hands them to the kernels of the device.
#include <atomic>

#include "core/parallel.h"
#include "core/status.h"
#include "core/update_layout.h"
#include "cpu/cpu_ops.h"
#include "rfk/philox.h"
#include "rfk/rfk.h"

#if RFK_HAS_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace {

using rfk::set_error;

std::atomic<uint64_t> launches[RFK_OP_COUNT][RFK_ISA_COUNT];

const rfk::CpuOps& cpu_ops(rfk_op op) {
  const int32_t used = rfk_isa_used();
  const int32_t isa = used > RFK_ISA_AVX512 ? RFK_ISA_AVX512 : used;  // these ops have nothing for the tile unit
  launches[op][isa].fetch_add(1, std::memory_order_relaxed);
#if RFK_X86
  if (isa == RFK_ISA_AVX512) return rfk::avx512::kOps;
  if (isa == RFK_ISA_AVX2) return rfk::avx2::kOps;
#endif
  return rfk::baseline::kOps;
}

int64_t numel(const rfk_tensor& t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

bool valid_tensor(const char* op, const char* name, const rfk_tensor* t) {
  if (t == nullptr) {
    set_error("%s: %s is missing", op, name);
    return false;
  }
  if (t->ndim < 0 || t->ndim > RFK_MAX_DIMS) {
    set_error("%s: %s must have at most %d dimensions; got %d", op, name, RFK_MAX_DIMS, t->ndim);
    return false;
  }
  if (t->dtype < RFK_FLOAT32 || t->dtype > RFK_FLOAT16) {
    set_error("%s: %s must be float32, float64, bfloat16 or float16; got dtype %d", op, name, t->dtype);
    return false;
  }
  for (int32_t d = 0; d < t->ndim; ++d) {
    if (t->shape[d] < 0) {
      set_error("%s: %s has a negative size", op, name);
      return false;
    }
  }
  if (t->data == nullptr && numel(*t) > 0) {
    set_error("%s: %s has elements but no memory", op, name);
    return false;
  }
  return true;
}

bool valid_like(const char* op, const char* name, const rfk_tensor* t, const rfk_tensor& x) {
  if (!valid_tensor(op, name, t)) return false;
  bool same = t->ndim == x.ndim;
  for (int32_t d = 0; same && d < x.ndim; ++d) same = t->shape[d] == x.shape[d];
  if (!same) set_error("%s: %s must have the shape of the first tensor", op, name);
  return same;
}

bool valid_output(const char* op, const char* name, const rfk_tensor* t, const rfk_tensor& x, int32_t dtype) {
  if (!valid_like(op, name, t, x)) return false;
  if (dtype >= 0 && t->dtype != dtype) {
    set_error("%s: %s must have the dtype of the first tensor", op, name);
    return false;
  }
  for (int32_t d = 0; d < t->ndim; ++d) {
    if (t->shape[d] > 1 && t->strides[d] == 0 && numel(*t) > 0) {
      set_error("%s: %s must have memory of its own for every element", op, name);
      return false;
    }
  }
  return true;
}

bool valid_scalar(const char* op, const char* name, const rfk_scalar* s) {
  if (s == nullptr || (s->data != nullptr && (s->dtype < RFK_FLOAT32 || s->dtype > RFK_FLOAT16))) {
    set_error("%s: %s must be a number or a floating point tensor", op, name);
    return false;
  }
  return true;
}

bool valid_device(const char* op, const rfk_device* device) {
  if (device == nullptr || (device->type != RFK_CPU && device->type != RFK_CUDA)) {
    set_error("%s: the device must be a CPU or a CUDA device", op);
    return false;
  }
#if !RFK_HAS_CUDA
  if (device->type == RFK_CUDA) {
    set_error("%s: this build has no CUDA kernels; rebuild with nvcc on the path and RFK_CUDA=ON", op);
    return false;
  }
#endif
  return true;
}

rfk_scalar number(double value) { return rfk_scalar{value, nullptr, 0, RFK_FLOAT64}; }

}  // namespace

namespace rfk {

void count_launch(rfk_op op, int32_t isa) { launches[op][isa].fetch_add(1, std::memory_order_relaxed); }

}  // namespace rfk

extern "C" {

rfk_status rfk_euler_step(const rfk_device* device, const rfk_tensor* x, const rfk_tensor* v,
                          const rfk_tensor* v_uncond, const rfk_scalar* dt, const rfk_scalar* guidance,
                          const rfk_tensor* out, const rfk_tensor* cast) {
  const char* op = "euler_step";
  if (!valid_device(op, device) || !valid_tensor(op, "x", x) || !valid_like(op, "v", v, *x) ||
      !valid_scalar(op, "dt", dt) || !valid_output(op, "out", out, *x, x->dtype) ||
      (v_uncond != nullptr &&
       (!valid_like(op, "v_uncond", v_uncond, *x) || !valid_scalar(op, "guidance_scale", guidance))) ||
      (cast != nullptr && !valid_output(op, "cast", cast, *x, -1))) {
    return RFK_INVALID;
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) {
    return rfk::cuda::euler_step(*device, *x, *v, v_uncond, *dt, guidance, *out, cast);
  }
#endif
  rfk::StepArguments a{};
  a.x = x;
  a.terms[0] = v;
  a.terms[1] = v_uncond;
  a.x_coefficient = number(1.0);
  a.coefficients[0] = *dt;
  if (v_uncond != nullptr) a.coefficients[1] = *guidance;
  a.count = v_uncond != nullptr ? 2 : 1;
  a.form = v_uncond != nullptr ? rfk::StepArguments::kGuided : rfk::StepArguments::kLinear;
  a.out = out;
  a.cast = cast;
  cpu_ops(RFK_OP_ODE_STEP).step(a);
  return RFK_OK;
}

rfk_status rfk_taylor_step(const rfk_device* device, const rfk_tensor* x, const rfk_tensor* derivatives, int32_t order,
                           const rfk_scalar* dt, const rfk_tensor* out, const rfk_tensor* cast) {
  const char* op = "taylor_step";
  if (!valid_device(op, device) || !valid_tensor(op, "x", x) || !valid_scalar(op, "dt", dt) ||
      !valid_output(op, "out", out, *x, x->dtype) || (cast != nullptr && !valid_output(op, "cast", cast, *x, -1))) {
    return RFK_INVALID;
  }
  if (order < 1 || order > 3) {
    set_error("%s: the order must be 1 to 3; got %d", op, order);
    return RFK_INVALID;
  }
  rfk::StepArguments a{};
  for (int32_t k = 0; k < order; ++k) {
    if (!valid_like(op, "derivatives", &derivatives[k], *x)) return RFK_INVALID;
    a.terms[k] = &derivatives[k];
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) return rfk::cuda::taylor_step(*device, *x, derivatives, order, *dt, *out, cast);
#endif
  a.x = x;
  a.x_coefficient = number(1.0);
  a.coefficients[0] = *dt;
  a.count = order;
  a.form = rfk::StepArguments::kTaylor;
  a.out = out;
  a.cast = cast;
  cpu_ops(RFK_OP_ODE_STEP).step(a);
  return RFK_OK;
}

rfk_status rfk_linear_step(const rfk_device* device, const rfk_tensor* x, const rfk_scalar* x_coefficient,
                           const rfk_tensor* tensors, const rfk_scalar* coefficients, int32_t count,
                           const rfk_noise* noise, const rfk_scalar* noise_scale, const rfk_tensor* out,
                           const rfk_tensor* cast) {
  const char* op = "linear_step";
  const bool noisy = noise != nullptr && noise->present != 0;
  if (!valid_device(op, device) || !valid_tensor(op, "x", x) || !valid_scalar(op, "x_coefficient", x_coefficient) ||
      !valid_output(op, "out", out, *x, x->dtype) || (noisy && !valid_scalar(op, "noise_scale", noise_scale)) ||
      (cast != nullptr && !valid_output(op, "cast", cast, *x, -1))) {
    return RFK_INVALID;
  }
  if (count < 0 || count > RFK_MAX_TERMS) {
    set_error("%s: at most %d tensors; got %d", op, RFK_MAX_TERMS, count);
    return RFK_INVALID;
  }
  rfk::StepArguments a{};
  for (int32_t k = 0; k < count; ++k) {
    if (!valid_like(op, "tensors", &tensors[k], *x) || !valid_scalar(op, "coefficients", &coefficients[k])) {
      return RFK_INVALID;
    }
    a.terms[k] = &tensors[k];
    a.coefficients[k] = coefficients[k];
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) {
    return rfk::cuda::linear_step(*device, *x, *x_coefficient, tensors, coefficients, count, noisy ? noise : nullptr,
                                  noisy ? noise_scale : nullptr, *out, cast);
  }
#endif
  a.x = x;
  a.x_coefficient = *x_coefficient;
  a.count = count;
  a.form = rfk::StepArguments::kLinear;
  a.noise = noisy ? noise : nullptr;
  a.noise_scale = noisy ? *noise_scale : number(0.0);
  a.out = out;
  a.cast = cast;
  cpu_ops(RFK_OP_ODE_STEP).step(a);
  return RFK_OK;
}

rfk_status rfk_interpolate(const rfk_device* device, const rfk_tensor* x1, const rfk_tensor* x0, const rfk_noise* noise,
                           const rfk_scalar* t, int32_t path, const rfk_scalar* custom, const rfk_tensor* xt,
                           const rfk_tensor* target, const rfk_tensor* x0_out) {
  const char* op = "interpolate";
  if (!valid_device(op, device) || !valid_tensor(op, "x1", x1) ||
      (x0 != nullptr && !valid_like(op, "x0", x0, *x1)) || !valid_output(op, "xt", xt, *x1, x1->dtype) ||
      !valid_output(op, "target", target, *x1, x1->dtype) ||
      (x0_out != nullptr && !valid_output(op, "x0_out", x0_out, *x1, x1->dtype))) {
    return RFK_INVALID;
  }
  if (x0 == nullptr && (noise == nullptr || noise->present == 0)) {
    set_error("%s: x0 or noise must be given", op);
    return RFK_INVALID;
  }
  rfk::InterpolateArguments a{};
  if (path == RFK_PATH_CUSTOM) {
    if (custom == nullptr) {
      set_error("%s: a custom path needs its four coefficients", op);
      return RFK_INVALID;
    }
    for (int k = 0; k < 4; ++k) {
      if (!valid_scalar(op, "custom", &custom[k])) return RFK_INVALID;
      a.custom[k] = custom[k];
    }
  } else if (path < RFK_PATH_LINEAR || path > RFK_PATH_SUB_VP) {
    set_error("%s: unknown path %d", op, path);
    return RFK_INVALID;
  } else {
    if (!valid_scalar(op, "t", t)) return RFK_INVALID;
    a.t = *t;
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) {
    const rfk_scalar zero = number(0.0);
    return rfk::cuda::interpolate(*device, *x1, x0, noise, t != nullptr ? *t : zero, path, custom, *xt, *target, x0_out);
  }
#endif
  a.x1 = x1;
  a.x0 = x0;
  a.noise = noise;
  a.path = path;
  a.xt = xt;
  a.target = target;
  a.x0_out = x0_out;
  cpu_ops(RFK_OP_INTERPOLATE).interpolate(a);
  return RFK_OK;
}

int64_t rfk_flow_loss_workspace(int64_t samples, int64_t elements_per_sample) {
  return samples * ((elements_per_sample + RFK_LOSS_BLOCK - 1) / RFK_LOSS_BLOCK);
}

rfk_status rfk_flow_loss(const rfk_device* device, const rfk_tensor* prediction, const rfk_tensor* target,
                         const rfk_tensor* x0, const rfk_tensor* x1, const rfk_noise* noise, const rfk_scalar* weight,
                         int32_t kind, double c, double grad_scale, const rfk_tensor* losses, const rfk_tensor* grad,
                         double* workspace) {
  const char* op = "flow_loss";
  if (!valid_device(op, device) || !valid_tensor(op, "prediction", prediction) ||
      (target != nullptr && !valid_like(op, "target", target, *prediction)) ||
      (x0 != nullptr && !valid_like(op, "x0", x0, *prediction)) ||
      (x1 != nullptr && !valid_like(op, "x1", x1, *prediction)) ||
      (weight != nullptr && !valid_scalar(op, "weight", weight)) || !valid_tensor(op, "losses", losses) ||
      (grad != nullptr && !valid_output(op, "grad", grad, *prediction, prediction->dtype))) {
    return RFK_INVALID;
  }
  const int32_t compute = prediction->dtype == RFK_FLOAT64 ? RFK_FLOAT64 : RFK_FLOAT32;
  if (prediction->ndim < 1 || losses->ndim != 1 || losses->shape[0] != prediction->shape[0] ||
      losses->dtype != compute) {
    set_error("%s: losses must be one value per sample in the compute type", op);
    return RFK_INVALID;
  }
  if (target == nullptr && (x1 == nullptr || (x0 == nullptr && (noise == nullptr || noise->present == 0)))) {
    set_error("%s: the target, or x1 with x0 or noise must be given", op);
    return RFK_INVALID;
  }
  if (kind < RFK_LOSS_MSE || kind > RFK_LOSS_PSEUDO_HUBER_ELEMENTWISE) {
    set_error("%s: unknown kind %d", op, kind);
    return RFK_INVALID;
  }
  if (workspace == nullptr && numel(*prediction) > 0) {
    set_error("%s: a workspace of rfk_flow_loss_workspace doubles is needed", op);
    return RFK_INVALID;
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) {
    return rfk::cuda::flow_loss(*device, *prediction, target, x0, x1, noise, weight, kind, c, grad_scale, *losses, grad,
                                workspace);
  }
#endif
  const rfk::LossArguments a{prediction, target, x0, x1, noise, weight, kind, c, grad_scale, losses, grad, workspace};
  cpu_ops(RFK_OP_FLOW_LOSS).flow_loss(a);
  return RFK_OK;
}

rfk_status rfk_random(const rfk_device* device, const rfk_noise* noise, int32_t distribution, const rfk_tensor* out) {
  const char* op = "random";
  if (!valid_device(op, device) || !valid_tensor(op, "out", out) || !valid_output(op, "out", out, *out, -1)) {
    return RFK_INVALID;
  }
  if (noise == nullptr || (distribution != RFK_NORMAL && distribution != RFK_UNIFORM)) {
    set_error("%s: a seed and a known distribution must be given", op);
    return RFK_INVALID;
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) return rfk::cuda::random(*device, *noise, distribution, *out);
#endif
  const rfk::RandomArguments a{noise, distribution, out};
  cpu_ops(RFK_OP_RANDOM).random(a);
  return RFK_OK;
}

int64_t rfk_projected_update_workspace(const rfk_update_parameter* parameters, int64_t count) {
  int64_t doubles = 0;
  for (int64_t k = 0; k < count; ++k) doubles += rfk::update_doubles(parameters[k]);
  return doubles;
}

rfk_status rfk_projected_update(const rfk_device* device, const rfk_update_parameter* parameters, int64_t count,
                                const rfk_update_options* options, int32_t phase, double* summary, double* workspace) {
  const char* op = "projected_update";
  if (!valid_device(op, device)) return RFK_INVALID;
  if (options == nullptr || (options->rule != RFK_UPDATE_ADAMP && options->rule != RFK_UPDATE_SGDP) ||
      !valid_scalar(op, "learning_rate", &options->learning_rate)) {
    set_error("%s: the options must have a known rule and a learning rate", op);
    return RFK_INVALID;
  }
  if (phase < RFK_UPDATE_WHOLE || phase > RFK_UPDATE_APPLY || (phase != RFK_UPDATE_WHOLE && summary == nullptr)) {
    set_error("%s: the phase must be 0, or 1 or 2 with a summary; got %d", op, phase);
    return RFK_INVALID;
  }
  if (count < 0 || (count > 0 && (parameters == nullptr || workspace == nullptr))) {
    set_error("%s: parameters and a workspace of rfk_projected_update_workspace doubles are needed", op);
    return RFK_INVALID;
  }
  const bool adam = options->rule == RFK_UPDATE_ADAMP;
  for (int64_t k = 0; k < count; ++k) {
    const rfk_update_parameter& p = parameters[k];
    const bool empty = p.rows == 0 || p.columns == 0;
    const bool known = p.dtype >= RFK_FLOAT32 && p.dtype <= RFK_FLOAT16 &&
                       (p.average == nullptr || (p.average_dtype >= RFK_FLOAT32 && p.average_dtype <= RFK_FLOAT16));
    if (!known || p.rows < 0 || p.columns < 0 || p.total < p.rows * p.columns) {
      set_error("%s: parameter %lld must be rows x columns of float32, float64, bfloat16 or float16", op,
                static_cast<long long>(k));
      return RFK_INVALID;
    }
    if ((!empty && (p.weight == nullptr || p.grad == nullptr || p.first == nullptr || (adam && p.second == nullptr))) ||
        (adam && p.step == nullptr)) {
      set_error("%s: parameter %lld lacks a weight, a gradient, a moment or a step", op, static_cast<long long>(k));
      return RFK_INVALID;
    }
  }
#if RFK_HAS_CUDA
  if (device->type == RFK_CUDA) {
    return rfk::cuda::projected_update(*device, parameters, count, *options, phase, summary, workspace);
  }
#endif
  const rfk::UpdateArguments a{parameters, count, options, phase, summary, workspace};
  cpu_ops(RFK_OP_PROJECTED_UPDATE).projected_update(a);
  return RFK_OK;
}

void rfk_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  for (int i = 0; i < 4; ++i) words[i] = counter[i];
  rfk::philox4x32(words[0], words[1], words[2], words[3], key[0], key[1]);
}

int32_t rfk_isa_compiled(int32_t isa) {
#if RFK_X86
  return isa >= RFK_ISA_BASELINE && isa <= RFK_ISA_AMX;
#else
  return isa == RFK_ISA_BASELINE;
#endif
}

int32_t rfk_max_threads(void) { return rfk::max_threads(); }

int32_t rfk_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

int32_t rfk_has_cuda(void) { return RFK_HAS_CUDA; }

const char* rfk_cuda_archs(void) {
#if RFK_HAS_CUDA
  return rfk::cuda::archs();
#else
  return "";
#endif
}

uint64_t rfk_launch_count(int32_t op, int32_t isa) {
  if (op < 0 || op >= RFK_OP_COUNT || isa >= RFK_ISA_COUNT) return 0;
#if RFK_HAS_CUDA
  if (isa < 0) return rfk::cuda::launch_count(op);
#else
  if (isa < 0) return 0;
#endif
  return launches[op][isa].load(std::memory_order_relaxed);
}

}  // extern "C"
