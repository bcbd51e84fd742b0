// random.cu: counter-based normals and uniforms (philox.h) by logical element index.
//
// Four elements share one counter, so a contiguous tensor is written four elements a thread and access; other layouts are
// walked in logical order, four elements a thread. Arithmetic bounds it: 4 bytes an element leave, about 50 instructions
// make one. Uniforms take as many leading bits of the word as the dtype holds exactly (24; float16 11; bfloat16 8).
#include "cuda/common.cuh"

namespace rfk {
namespace cuda {
namespace {

struct Drawing {
  Operand out;
  int64_t numel;
  Rows rows;
  Noise noise;
};

struct StridedDrawing {
  Drawing call;
  Space space;
};

__global__ void __launch_bounds__(kThreads) random_dense(const __grid_constant__ Drawing p) {
  constexpr int kTile = kThreads * 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t limit = p.numel - p.numel % 4;
  const Spot start = tile_start(p.rows, static_cast<int64_t>(blockIdx.x) * kTile);
  const Spot spot = advance<kTile>(p.rows, start, thread * 4, limit);
  if (spot.inside) {
    float z[4];
    draw_pack<4, true>(p.noise, spot, z);
    store_pack<kAny, 4>(p.out.data, p.out.dtype, spot.index, z);
  }
  if (holds_tail()) {
    const Spot tail = tail_spot<kTile>(p.rows, start, limit, p.numel);
    if (tail.inside) store_element(p.out.data, p.out.dtype, tail.index, draw_one<true>(p.noise, tail));
  }
}

__global__ void __launch_bounds__(kThreads) random_strided(const __grid_constant__ StridedDrawing q) {
  const Drawing& p = q.call;
  const Spot start = tile_start(p.rows, static_cast<int64_t>(blockIdx.x) * kStridedTile);
  NumberCache<true> numbers;
#pragma unroll 1
  for (int j = 0; j < kStridedPerThread; ++j) {
    const Spot spot = advance<kStridedTile>(p.rows, start, strided_shift(true, j), p.numel);
    if (!spot.inside) continue;
    int64_t at[1];
    offsets(q.space, 1, spot.index, at);
    const float z = numbers.at(p.noise, spot);
    store_element(p.out.data, p.out.dtype, at[0], z);
  }
}

}  // namespace

rfk_status random(const rfk_device& device, const rfk_noise& noise, int distribution, const rfk_tensor& out) {
  const rfk_tensor* operands[1] = {&out};
  StridedDrawing strided = {};
  strided.space = make_space(operands, 1, 0, Order::kLogical);
  Drawing& call = strided.call;
  call.out = operand(&out);
  call.numel = strided.space.numel;
  call.rows = rows(strided.space, noise.per_sample != 0);
  call.noise = noise_source(noise, distribution, out.dtype);
  Launcher launcher(device, RFK_OP_RANDOM);
  if (call.numel == 0) return launcher.status();
  if (packable(strided.space, operands, 1, 4) && whole_packs(call.rows, 4)) {
    launcher.run(random_dense, call, blocks_for(call.numel, kThreads * 4));
  } else {
    launcher.run(random_strided, strided, blocks_for(call.numel, kStridedTile));
  }
  return launcher.status();
}

}  // namespace cuda
}  // namespace rfk
