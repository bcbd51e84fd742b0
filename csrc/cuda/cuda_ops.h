// cuda_ops.h: entry points of the CUDA kernels, called by core/dispatch.cpp with validated arguments.
//
// Every function launches on device.stream, allocates nothing and does not synchronise, so it may be captured into a CUDA
// graph. The caller's current device is restored. Formulas and rounding: rfk.h; they are the CPU kernels' bit for bit,
// except for the losses of flow_loss, whose sums run in another (fixed) order.
#ifndef RFK_CUDA_CUDA_OPS_H_
#define RFK_CUDA_CUDA_OPS_H_

#include <cstdint>

#include "rfk/rfk.h"

namespace rfk {
namespace cuda {

rfk_status euler_step(const rfk_device& device, const rfk_tensor& x, const rfk_tensor& v, const rfk_tensor* v_uncond,
                      const rfk_scalar& dt, const rfk_scalar* guidance, const rfk_tensor& out, const rfk_tensor* cast);

rfk_status taylor_step(const rfk_device& device, const rfk_tensor& x, const rfk_tensor* derivatives, int order,
                       const rfk_scalar& dt, const rfk_tensor& out, const rfk_tensor* cast);

rfk_status linear_step(const rfk_device& device, const rfk_tensor& x, const rfk_scalar& x_coefficient,
                       const rfk_tensor* tensors, const rfk_scalar* coefficients, int count, const rfk_noise* noise,
                       const rfk_scalar* noise_scale, const rfk_tensor& out, const rfk_tensor* cast);

rfk_status interpolate(const rfk_device& device, const rfk_tensor& x1, const rfk_tensor* x0, const rfk_noise* noise,
                       const rfk_scalar& t, int path, const rfk_scalar* custom, const rfk_tensor& xt,
                       const rfk_tensor& target, const rfk_tensor* x0_out);

rfk_status flow_loss(const rfk_device& device, const rfk_tensor& prediction, const rfk_tensor* target,
                     const rfk_tensor* x0, const rfk_tensor* x1, const rfk_noise* noise, const rfk_scalar* weight,
                     int kind, double c, double grad_scale, const rfk_tensor& losses, const rfk_tensor* grad,
                     double* workspace);

rfk_status random(const rfk_device& device, const rfk_noise& noise, int distribution, const rfk_tensor& out);

rfk_status quantize_queries(const rfk_device& device, const rfk_tensor& q, bool e4m3, uint8_t* codes, float* scale,
                            uint8_t* finite);

// v NULL: keys only. workspace: quantize_workspace bytes.
rfk_status quantize_keys(const rfk_device& device, const rfk_tensor& k, const rfk_tensor* v, const rfk_tensor* valid,
                         bool e4m3_keys, bool e4m3_values, const rfk_quantized_heads& out, void* workspace);
int64_t quantize_workspace(int64_t pairs, int64_t keys, int64_t channels, int64_t value_channels);

// Workspace: core/update_layout.h. Three launches for every 32 parameters of one dtype (one where none is projected).
rfk_status projected_update(const rfk_device& device, const rfk_update_parameter* parameters, int64_t count,
                            const rfk_update_options& options, int phase, double* summary, double* workspace);

// The architectures compiled into this binary, e.g. "80;90a;100;120+PTX".
const char* archs();

// Kernels launched for that rfk_op since the library was loaded (one flow_loss takes one to three).
uint64_t launch_count(int op);

}  // namespace cuda
}  // namespace rfk

#endif  // RFK_CUDA_CUDA_OPS_H_
