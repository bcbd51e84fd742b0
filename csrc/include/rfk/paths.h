// paths.h: the coefficients of the named interpolation paths, shared by CPU and CUDA.
//
// x_t = alpha x1 + sigma x0, target = dalpha x1 + dsigma x0. Computed in double from t (already rounded to the compute
// type) and rounded to the compute type by the caller.
#ifndef RFK_PATHS_H_
#define RFK_PATHS_H_

#include <math.h>

#include "rfk/host_device.h"
#include "rfk/rfk.h"

namespace rfk {

struct PathCoefficients {
  double alpha, sigma, dalpha, dsigma;
};

constexpr double kVpSlope = 19.9, kVpFloor = 0.1;  // beta_max - beta_min and beta_min

RFK_HD PathCoefficients path_coefficients(int path, double t) {
  constexpr double half_pi = 1.57079632679489661923;
  if (path == RFK_PATH_LINEAR) return {t, 1.0 - t, 1.0, -1.0};
  if (path == RFK_PATH_TRIGONOMETRIC) {
    const double sine = sin(half_pi * t), cosine = cos(half_pi * t);
    return {sine, cosine, half_pi * cosine, -half_pi * sine};
  }
  const double r = 1.0 - t;
  const double alpha = exp(-0.25 * kVpSlope * r * r - 0.5 * kVpFloor * r);
  const double dalpha = alpha * (0.5 * kVpSlope * r + 0.5 * kVpFloor);
  const double variance = 1.0 - alpha * alpha;
  if (path == RFK_PATH_VP) {
    const double sigma = sqrt(variance);
    return {alpha, sigma, dalpha, -alpha * dalpha / sigma};
  }
  return {alpha, variance, dalpha, -2.0 * alpha * dalpha};
}

}  // namespace rfk

#endif  // RFK_PATHS_H_
