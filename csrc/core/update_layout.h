// update_layout.h: where the numbers of one parameter lie in the workspace of projected_update, the same on every device.
//
// Parameter by parameter, in doubles: kUpdateHeader of them (the summary, then the decision), then per row and segment of
// RFK_UPDATE_BLOCK columns {sum g w, sum g^2, sum w^2, sum u w}; the sums of a row end up in its first segment. A parameter
// that is never projected has the header only.
#ifndef RFK_CORE_UPDATE_LAYOUT_H_
#define RFK_CORE_UPDATE_LAYOUT_H_

#include <cstdint>

#include "rfk/rfk.h"

namespace rfk {

// The decision: which view is projected, and what the weights are multiplied by.
enum UpdateView { kViewNone = 0, kViewChannel = 1, kViewLayer = 2 };
enum UpdateHeader { kDecidedView = RFK_UPDATE_SUMMARY, kDecidedStep, kDecidedKeep, kDecidedLayer, kUpdateHeader = 10 };
enum UpdateSum { kSumGw, kSumGg, kSumWw, kSumUw, kUpdateSums };

static inline int64_t update_segments(int64_t columns) { return (columns + RFK_UPDATE_BLOCK - 1) / RFK_UPDATE_BLOCK; }

static inline int64_t update_doubles(const rfk_update_parameter& p) {
  return kUpdateHeader + (p.projected != 0 ? p.rows * update_segments(p.columns) * kUpdateSums : 0);
}

}  // namespace rfk

#endif  // RFK_CORE_UPDATE_LAYOUT_H_
