/* rfk.h: the C ABI of the rfkernels native core.
 *
 * Plain structs over pointers, shapes, strides (in elements) and a dtype; no Python, no torch, no allocation of device
 * memory. Every function returns an rfk_status; on failure rfk_last_error() has one sentence for the calling thread and
 * nothing has been written. All elementwise operands of a call have the same shape; strides are free (any order, zero,
 * negative). An output may be the very same memory as an input (same pointer, strides and dtype) but may not overlap one
 * in any other way: the caller checks that.
 *
 * Arithmetic: the compute type C is double when x (x1, prediction) is float64, else float. Every product and every sum is
 * rounded to C separately (no fma contraction), operands are converted to C first, results are rounded once to the type
 * of the output. Formulas and their order of operations stand at each function and are the same bit for bit on every ISA
 * level, thread count and device.
 */
#ifndef RFK_RFK_H_
#define RFK_RFK_H_

#include <stdint.h>

#if defined(_WIN32)
#define RFK_API
#else
#define RFK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define RFK_MAX_DIMS 16   /* dimensions of a tensor */
#define RFK_MAX_TERMS 8   /* tensors beside x in a linear step */
#define RFK_LOSS_BLOCK 4096 /* elements of one partial sum of flow_loss; fixed, so that sums do not depend on threads */
#define RFK_UPDATE_BLOCK 4096 /* columns of one partial sum of projected_update */
#define RFK_UPDATE_SUMMARY 5  /* doubles of the summary of one parameter */

typedef enum { RFK_OK = 0, RFK_INVALID = 1, RFK_UNSUPPORTED = 2, RFK_CUDA_ERROR = 3 } rfk_status;
typedef enum {
  RFK_FLOAT32 = 0,
  RFK_FLOAT64 = 1,
  RFK_BFLOAT16 = 2,
  RFK_FLOAT16 = 3,
  RFK_BOOL = 4 /* bytes 0 and 1; attention masks only */
} rfk_dtype;
typedef enum { RFK_CPU = 0, RFK_CUDA = 1 } rfk_device_type;

/* Where to run. stream is a cudaStream_t (a CUstream) and is ignored on the CPU. */
typedef struct {
  int32_t type;  /* rfk_device_type */
  int32_t index;
  void* stream;
} rfk_device;

/* A strided tensor. data may be NULL only where the tensor has no elements, or to say that an optional one is absent. */
typedef struct {
  void* data;
  int32_t dtype; /* rfk_dtype */
  int32_t ndim;
  int64_t shape[RFK_MAX_DIMS];
  int64_t strides[RFK_MAX_DIMS];
} rfk_tensor;

/* A scalar for the whole call (data NULL), or one in memory of the device: sample b uses data[b * stride]; stride 0 for a
 * 0-d tensor. It is converted to C before anything is computed from it. */
typedef struct {
  double value;
  const void* data;
  int64_t stride;
  int32_t dtype;
} rfk_scalar;

/* Key and offset of the counter-based generator. seed_data / offset_data point to int64 on the device, or are NULL.
 * per_sample != 0: the element index restarts at 0 in every sample. */
typedef struct {
  uint64_t seed;
  uint64_t offset;
  const int64_t* seed_data;
  const int64_t* offset_data;
  int64_t seed_stride;
  int64_t offset_stride;
  int32_t per_sample;
  int32_t present; /* 0: no noise is asked for */
} rfk_noise;

/* ode_step ------------------------------------------------------------------------------------------------------- */

/* euler: out = x + dt * v, guided (v_uncond given): w = v_uncond + g * (v - v_uncond), out = x + dt * w.
 * v_uncond and cast may be NULL. cast receives the stored state (as rounded to out) in its own dtype. */
RFK_API rfk_status rfk_euler_step(const rfk_device* device, const rfk_tensor* x, const rfk_tensor* v,
                                  const rfk_tensor* v_uncond, const rfk_scalar* dt, const rfk_scalar* guidance,
                                  const rfk_tensor* out, const rfk_tensor* cast);

/* taylor: out = ((x + dt * d0) + c2 * d1) + c3 * d2 with c2 = (dt * dt) * 0.5, c3 = ((dt * dt) * dt) * C(1/6), each
 * product rounded to C; order = 1..3 derivatives. */
RFK_API rfk_status rfk_taylor_step(const rfk_device* device, const rfk_tensor* x, const rfk_tensor* derivatives,
                                   int32_t order, const rfk_scalar* dt, const rfk_tensor* out, const rfk_tensor* cast);

/* linear: out = ((c0 * x + c1 * t1) + ... + cn * tn) + cnoise * z, z standard normal of the element (see rfk_noise).
 * count = 0..RFK_MAX_TERMS. noise may be NULL. */
RFK_API rfk_status rfk_linear_step(const rfk_device* device, const rfk_tensor* x, const rfk_scalar* x_coefficient,
                                   const rfk_tensor* tensors, const rfk_scalar* coefficients, int32_t count,
                                   const rfk_noise* noise, const rfk_scalar* noise_scale, const rfk_tensor* out,
                                   const rfk_tensor* cast);

/* interpolate ---------------------------------------------------------------------------------------------------- */

typedef enum {
  RFK_PATH_LINEAR = 0,
  RFK_PATH_TRIGONOMETRIC = 1,
  RFK_PATH_VP = 2,
  RFK_PATH_SUB_VP = 3,
  RFK_PATH_CUSTOM = 4
} rfk_path;

/* xt = sigma * x0 + alpha * x1, target = dsigma * x0 + dalpha * x1 (linear: target = x1 - x0). The four coefficients come
 * from t (see paths.h) or, for RFK_PATH_CUSTOM, from `custom` = {alpha, sigma, dalpha, dsigma}. x0 NULL: drawn from noise
 * in C, unrounded. x0_out may be NULL. */
RFK_API rfk_status rfk_interpolate(const rfk_device* device, const rfk_tensor* x1, const rfk_tensor* x0,
                                   const rfk_noise* noise, const rfk_scalar* t, int32_t path, const rfk_scalar* custom,
                                   const rfk_tensor* xt, const rfk_tensor* target, const rfk_tensor* x0_out);

/* flow_loss ------------------------------------------------------------------------------------------------------ */

typedef enum { RFK_LOSS_MSE = 0, RFK_LOSS_PSEUDO_HUBER = 1, RFK_LOSS_PSEUDO_HUBER_ELEMENTWISE = 2 } rfk_loss_kind;

/* r = prediction - target, target given or x1 - x0 (x0 NULL: drawn), in C. Of a sample with d elements, S = sum r^2:
 *   mse            S / d                              gradient  r * (2 / d)
 *   pseudo_huber   (sqrt(S + c^2) - c) / d            gradient  r * (1 / (d sqrt(S + c^2)))
 *   elementwise    sum(sqrt(r^2 + c^2) - c) / d       gradient  (r / sqrt(r^2 + c^2)) / d
 * losses: (B) of type C, unweighted. grad (may be NULL): the gradient times weight_b * grad_scale. weight may be NULL.
 * workspace: rfk_flow_loss_workspace(B, d) doubles on the device; sums run over fixed blocks of RFK_LOSS_BLOCK elements,
 * so they do not depend on the number of threads. */
RFK_API int64_t rfk_flow_loss_workspace(int64_t samples, int64_t elements_per_sample);
RFK_API rfk_status rfk_flow_loss(const rfk_device* device, const rfk_tensor* prediction, const rfk_tensor* target,
                                 const rfk_tensor* x0, const rfk_tensor* x1, const rfk_noise* noise,
                                 const rfk_scalar* weight, int32_t kind, double c, double grad_scale,
                                 const rfk_tensor* losses, const rfk_tensor* grad, double* workspace);

/* random --------------------------------------------------------------------------------------------------------- */

typedef enum { RFK_NORMAL = 0, RFK_UNIFORM = 1 } rfk_distribution;

/* Philox4x32-10 normals or uniforms (philox.h) into out, by logical element index. */
RFK_API rfk_status rfk_random(const rfk_device* device, const rfk_noise* noise, int32_t distribution,
                              const rfk_tensor* out);

/* The raw generator, for tests: the four words of one counter. */
RFK_API void rfk_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);

/* quantize and attention ----------------------------------------------------------------------------------------- */

/* What is quantized to what: rfkernels/backends/attention_schemes.py. The e4m3 schemes are quantized on CUDA only; attention runs on the
 * CPU. */
typedef enum {
  RFK_ATTENTION_INT8_U8 = 0,   /* Q, K int8; P uint8 and V int8 with a scale per key */
  RFK_ATTENTION_INT8_BF16 = 1, /* Q, K int8; P and V bfloat16 */
  RFK_ATTENTION_BF16 = 2,      /* all bfloat16 */
  RFK_ATTENTION_INT8_FP8 = 3,  /* Q, K int8; P and V e4m3 */
  RFK_ATTENTION_FP8 = 4        /* all e4m3 */
} rfk_attention_scheme;

#define RFK_MAX_CHANNELS 256 /* of a head */

/* Bytes of the quantized keys and values of one head, and where its parts begin (core/attention_layout.h): offsets[9] =
 * keys, values, key_scale, addend, inverse, row_sum, value_scale, mean, flag. */
RFK_API int64_t rfk_quantized_bytes(int32_t scheme, int64_t keys, int64_t channels, int64_t value_channels, int64_t* offsets);

/* k (B, H, S, D) and v (B, H, S, Dv) into packed (B, H, rfk_quantized_bytes), 64-byte aligned. valid: (B, H, S) bytes, keys that count in
 * means and scales, or NULL. CPU. */
RFK_API rfk_status rfk_quantize_keys(const rfk_device* device, const rfk_tensor* k, const rfk_tensor* v, const uint8_t* valid,
                                     int32_t scheme, void* packed);

/* q (B, H, S, D) to codes (B, H, S, power of two >= D) and scale (B, H, S), the same codes that attention makes for itself; finite (B, H)
 * receives 0 for heads with a NaN or an infinity. CPU, int8_u8 and int8_bf16. */
RFK_API rfk_status rfk_quantize_queries(const rfk_device* device, const rfk_tensor* q, int32_t scheme, int8_t* codes,
                                        float* scale, uint8_t* finite);

/* The same on CUDA, for RFK_ATTENTION_INT8_BF16, _INT8_FP8 and _FP8 (e4m3 codes): rows with a NaN or an infinity get a NaN scale, and
 * finite (or NULL) is left alone but for 0 at such heads. codes: 8-byte aligned. One launch. */
RFK_API rfk_status rfk_quantize_queries_cuda(const rfk_device* device, const rfk_tensor* q, int32_t scheme, void* codes,
                                             float* scale, uint8_t* finite);

/* Quantized keys and values on CUDA, contiguous. Dp: the power of two >= D. */
typedef struct {
  void* codes;        /* (B, H, S, Dp) int8 or e4m3; 8-byte aligned */
  float* scale;       /* (B, H, ceil(S / 64)); NaN where the block holds a NaN or an infinity */
  float* mean;        /* (B, H, D), 16-byte aligned */
  void* value_codes;  /* e4m3: (B, H, Dv, S rounded up to 128), zero filled; else (B, H, S, Dv) bfloat16, or NULL: checked only.
                         16-byte aligned */
  float* value_scale; /* (B, H, Dv), e4m3 only; NaN as above */
  uint8_t* finite;    /* (B, H): 1 where all of k and v is finite, else 0; or NULL */
} rfk_quantized_heads;

/* k and v (NULL: keys only; else of the dtype of k) on CUDA, float32, bfloat16 or float16; valid: (B, H, S) RFK_BOOL of any strides, keys
 * that count in means and scales (the others get codes 0), or NULL. workspace: rfk_quantize_workspace bytes on the device, 256-byte
 * aligned. Three launches on the stream, no synchronisation. */
RFK_API int64_t rfk_quantize_workspace(int64_t batch_heads, int64_t keys, int64_t channels, int64_t value_channels);
RFK_API rfk_status rfk_quantize_keys_cuda(const rfk_device* device, const rfk_tensor* k, const rfk_tensor* v,
                                          const rfk_tensor* valid, int32_t scheme, const rfk_quantized_heads* out,
                                          void* workspace);

/* out = softmax(scale Q K^T + mask) V, float32 inside. q (B, Hq, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), Hq a multiple of Hk; or
 * packed keys and values (k, v NULL; keys, value_channels and key_heads tell their shape). mask: (B, Hq, Sq, Sk) bool or float, strides
 * may be 0, or NULL; causal: key j <= query i. lse: (B, Hq, Sq) float32 or NULL. Rows that may attend nothing give 0, lse -infinity.
 * exact: (B, Hq) bytes, set to 1 for heads that hold a NaN or an infinity or could overflow: out and lse of those are undefined and the
 * caller computes them another way. CPU. */
RFK_API rfk_status rfk_attention(const rfk_device* device, const rfk_tensor* q, const rfk_tensor* k, const rfk_tensor* v,
                                 const void* packed, int64_t keys, int64_t value_channels, int64_t key_heads,
                                 const rfk_tensor* mask, int32_t causal, double scale, int32_t scheme,
                                 const rfk_tensor* out, const rfk_tensor* lse, uint8_t* exact);

/* projected_update ----------------------------------------------------------------------------------------------- */

typedef enum { RFK_UPDATE_ADAMP = 0, RFK_UPDATE_SGDP = 1 } rfk_update_rule;
typedef enum { RFK_UPDATE_WHOLE = 0, RFK_UPDATE_GATHER = 1, RFK_UPDATE_APPLY = 2 } rfk_update_phase;

/* One parameter, seen as rows x columns; every tensor of it is dense and lies in the same order, row after row. C is double
 * where dtype is float64, else float. */
typedef struct {
  int64_t rows, columns;
  int64_t total;       /* elements of the whole parameter, of which these rows may be a shard */
  void* weight;        /* dtype */
  const void* grad;    /* dtype */
  void* first;         /* C: exp_avg, or SGDP's momentum buffer */
  void* second;        /* C: exp_avg_sq; NULL for SGDP */
  float* step;         /* on the device: steps done before this one, to which the call adds 1; NULL for SGDP */
  void* average;       /* average_dtype: moving average of the weights, or NULL */
  int32_t dtype;
  int32_t average_dtype;
  int32_t projected;   /* 0: never projected (vectors and scalars) */
} rfk_update_parameter;

typedef struct {
  int32_t rule;          /* rfk_update_rule */
  int32_t nesterov;
  rfk_scalar learning_rate;
  double beta1, beta2;   /* SGDP: momentum and dampening */
  double eps, weight_decay, delta, decay_ratio;
  double average_decay;  /* average = average + (1 - average_decay) (weight - average) */
} rfk_update_options;

/* One step of AdamP or SGDP on `count` parameters in place: rfkernels/ops/projected_update.py has the formulas. Whether and
 * how a parameter is projected is decided on the device.
 * workspace: rfk_projected_update_workspace doubles on the device. summary: count x RFK_UPDATE_SUMMARY doubles on the device,
 * {greatest |cos(g, w)| of a row (infinity for NaN), sum g w, sum g^2, sum w^2, sum u w}.
 * phase RFK_UPDATE_WHOLE: everything; summary may be NULL. For sharded parameters in two calls with one workspace:
 * RFK_UPDATE_GATHER updates the moments and writes the summary of the local rows (parameters that are never projected are
 * done here), the caller reduces it (maximum and sums) over the shards, RFK_UPDATE_APPLY decides by it and updates the
 * weights. */
RFK_API int64_t rfk_projected_update_workspace(const rfk_update_parameter* parameters, int64_t count);
RFK_API rfk_status rfk_projected_update(const rfk_device* device, const rfk_update_parameter* parameters, int64_t count,
                                        const rfk_update_options* options, int32_t phase, double* summary,
                                        double* workspace);

/* core ----------------------------------------------------------------------------------------------------------- */

typedef enum { RFK_ISA_BASELINE = 0, RFK_ISA_AVX2 = 1, RFK_ISA_AVX512 = 2, RFK_ISA_AMX = 3, RFK_ISA_COUNT = 4 } rfk_isa;
typedef enum {
  RFK_OP_ODE_STEP = 0,
  RFK_OP_INTERPOLATE,
  RFK_OP_FLOW_LOSS,
  RFK_OP_RANDOM,
  RFK_OP_QUANTIZE,
  RFK_OP_ATTENTION,
  RFK_OP_PROJECTED_UPDATE,
  RFK_OP_COUNT
} rfk_op;

RFK_API const char* rfk_last_error(void);
RFK_API int32_t rfk_isa_detected(void); /* what this CPU can run, uncapped */
RFK_API int32_t rfk_isa_used(void);     /* capped by RFK_MAX_ISA and by rfk_isa_cap */
RFK_API int32_t rfk_attention_isa(void); /* of attention and quantize: AVX-512 needs VNNI there, AMX is used */
RFK_API rfk_status rfk_isa_cap(int32_t isa);  /* lower the level at run time (tests); RFK_ISA_COUNT - 1 lifts the cap */
RFK_API int32_t rfk_isa_compiled(int32_t isa); /* 1 when kernels of that level are in this binary */
RFK_API int32_t rfk_max_threads(void);
RFK_API int32_t rfk_has_openmp(void);
RFK_API int32_t rfk_has_cuda(void);     /* 1 when CUDA kernels are in this binary */
RFK_API const char* rfk_cuda_archs(void);
/* How often the launcher of that op ran on the CPU at that ISA level, or (isa = -1) on CUDA. */
RFK_API uint64_t rfk_launch_count(int32_t op, int32_t isa);

#ifdef __cplusplus
}
#endif

#endif  // RFK_RFK_H_
