// random.cpp: Philox4x32-10 normals or uniforms into a tensor, by logical element index (philox.h).
#include "cpu/cpu_ops.h"
#include "cpu/noise.h"
#include "cpu/tiles.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {

void random(const RandomArguments& a) {
  Operand out;
  const rfk_tensor* tensors[1] = {a.out};
  const Space space = make_space(tensors, 1, true, &out);
  if (space.numel == 0) return;
  // As many leading bits as the dtype holds exactly, so that a uniform is never rounded up to 1.
  const int bits = a.out->dtype == RFK_BFLOAT16 ? 8 : a.out->dtype == RFK_FLOAT16 ? 11 : 24;
  const NoiseSource source{a.noise, a.distribution, bits, space.per_sample};
  const bool stream = streams(space, out, nullptr, 0);
  parallel_ranges(space.numel, kTile, space.numel, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kTile];
    for_tiles(space, begin, end, false, [&](int64_t start, int n, int64_t) {
      float* values = output_tile(out, start, stream, buffer);
      source.fill(start, n, values);
      store_tile(space, out, start, n, stream, values);
    });
    if (stream) stream_fence();
  });
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
