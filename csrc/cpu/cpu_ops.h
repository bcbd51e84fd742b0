// cpu_ops.h: the table of CPU kernels, one per instruction set level; arguments are validated by core/dispatch.cpp.
#ifndef RFK_CPU_CPU_OPS_H_
#define RFK_CPU_CPU_OPS_H_

#include "rfk/rfk.h"

namespace rfk {

// A linear combination, or a guided Euler step where v_uncond is there.
struct StepArguments {
  const rfk_tensor* x;
  const rfk_tensor* terms[RFK_MAX_TERMS];  // guided: {v, v_uncond}
  rfk_scalar x_coefficient;
  rfk_scalar coefficients[RFK_MAX_TERMS];  // guided: {dt, guidance}; taylor: {dt}
  int32_t count;                           // number of terms
  enum Form { kLinear, kGuided, kTaylor } form;
  const rfk_noise* noise;  // NULL: none
  rfk_scalar noise_scale;
  const rfk_tensor* out;
  const rfk_tensor* cast;  // may be NULL
};

struct InterpolateArguments {
  const rfk_tensor* x1;
  const rfk_tensor* x0;    // NULL: drawn from noise
  const rfk_noise* noise;
  rfk_scalar t;
  int32_t path;
  rfk_scalar custom[4];
  const rfk_tensor *xt, *target, *x0_out;
};

struct LossArguments {
  const rfk_tensor* prediction;
  const rfk_tensor* target;  // NULL: x1 - x0
  const rfk_tensor* x0;      // NULL: drawn from noise
  const rfk_tensor* x1;
  const rfk_noise* noise;
  const rfk_scalar* weight;  // may be NULL
  int32_t kind;
  double c, grad_scale;
  const rfk_tensor* losses;
  const rfk_tensor* grad;  // may be NULL
  double* workspace;
};

struct RandomArguments {
  const rfk_noise* noise;
  int32_t distribution;
  const rfk_tensor* out;
};

struct UpdateArguments {
  const rfk_update_parameter* parameters;
  int64_t count;
  const rfk_update_options* options;
  int32_t phase;
  double* summary;  // may be NULL
  double* workspace;
};

struct CpuOps {
  void (*step)(const StepArguments&);
  void (*interpolate)(const InterpolateArguments&);
  void (*flow_loss)(const LossArguments&);
  void (*random)(const RandomArguments&);
  void (*projected_update)(const UpdateArguments&);
};

namespace baseline {
extern const CpuOps kOps;
}
#if RFK_X86
namespace avx2 {
extern const CpuOps kOps;
}
namespace avx512 {
extern const CpuOps kOps;
}
#endif

}  // namespace rfk

#endif  // RFK_CPU_CPU_OPS_H_
