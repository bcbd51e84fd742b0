// projected_update.cpp: AdamP and SGDP, many parameters a call, each as rows x columns.
//
// A parameter is projected when no row of it has |cos(g, w)| above delta / sqrt(columns), or else when the whole of it has
// not. So w and g have to be read to the last row before the first weight can be written, and the cheapest order is
//   1. sums of g w, g^2 and w^2:                         8 bytes an element (read g, w), nothing written;
//   2. moments, u, sum u w of the row, weights, average: 28 bytes (read g, m, v, w; write m, v, w); AdamW's own traffic.
// 36 bytes in float32 where the row test passes or nothing is projected: u of a row waits in the second-level cache. When the
// whole layer is projected, or a row is longer than kRowBuffer, sum u w is not known in time and step 2 falls apart:
// 24 (m, v) + 16 (u once more from m and v, w), 48 in all. Step 2 walks backwards, so that of a large parameter what step 1
// read last is still in the cache; a small one is read from memory once. Never projected: step 2 alone. SGDP has no v: 28, 40
// (36, and the projected update that goes into the momentum buffer, or nesterov's second look at g) and 20. An average adds 8.
//
// Sums run over RFK_UPDATE_BLOCK columns of one row in kLanes partial sums of C, then in double in order: the result depends
// neither on threads nor on the instruction set nor on which of the ways above was taken.
#include <cmath>

#include "core/update_layout.h"
#include "cpu/cpu_ops.h"
#include "cpu/tiles.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kRowBuffer = 16384;  // elements of u; with the row itself 0.4 MB, a second-level cache holds it
constexpr int64_t kRun = 65536;  // elements that are walked forwards
constexpr int64_t kShortRow = 512;     // shorter rows share a tile

template <class C>
inline C root(C value) {
  return std::sqrt(value);
}

// 16 partial sums. A vector type of the compiler: left to itself, gcc 12 keeps arrays of them in memory, at 8 times the cost.
#if defined(__GNUC__)
template <class C>
struct Sixteen;
template <>
struct Sixteen<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Sixteen<double> {
  typedef double type __attribute__((vector_size(128)));
};
template <class C>
struct Lanes {
  typename Sixteen<C>::type v = {};
  C& operator[](int l) { return reinterpret_cast<C*>(&v)[l]; }
  void add(const C* x, const C* y) {
    typename Sixteen<C>::type a, b;
    std::memcpy(&a, x, sizeof a);
    std::memcpy(&b, y, sizeof b);
    v += a * b;
  }
};
#else
template <class C>
struct Lanes {
  C v[kLanes] = {};
  C& operator[](int l) { return v[l]; }
  void add(const C* x, const C* y) {
    for (int l = 0; l < kLanes; ++l) v[l] += x[l] * y[l];
  }
};
#endif

template <class C>
double total(Lanes<C>& lanes) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  return sum;
}

// Adds x y to the partial sums, element i to lane i % 16.
template <class C>
RFK_NOINLINE void add_products(int n, const C* x, const C* y, Lanes<C>& out) {
  Lanes<C> lanes = out;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes.add(x + i, y + i);
  out = lanes;
  for (int l = 0; i + l < n; ++l) out[l] += x[i + l] * y[i + l];
}

// The same for g w, g^2 and w^2 at once.
template <class C>
RFK_NOINLINE void add_three(int n, const C* g, const C* w, Lanes<C>* out) {
  Lanes<C> gw = out[kSumGw], gg = out[kSumGg], ww = out[kSumWw];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    gw.add(g + i, w + i);
    gg.add(g + i, g + i);
    ww.add(w + i, w + i);
  }
  out[kSumGw] = gw;
  out[kSumGg] = gg;
  out[kSumWw] = ww;
  for (int l = 0; i + l < n; ++l) {
    out[kSumGw][l] += g[i + l] * w[i + l];
    out[kSumGg][l] += g[i + l] * g[i + l];
    out[kSumWw][l] += w[i + l] * w[i + l];
  }
}

template <class C>
struct Scratch {
  alignas(64) C grad[kTile];
  alignas(64) C weight[kTile];
  alignas(64) C average[kTile];
  alignas(64) C update[kRowBuffer];
};

// The numbers of the element formulas; loops work on a copy that no store can touch.
template <class C>
struct Factors {
  C b1, c1, b2, c2, correction, eps;  // c = 1 - b, correction = 1 / sqrt(1 - beta2^t)
  C keep, step, toward;               // of weights and average
};

template <class C, bool kAdam, bool kNesterov>
class Update {
 public:
  Update(const rfk_update_parameter& parameter, const UpdateArguments& arguments, double* summary, double* space)
      : p_(parameter), o_(*arguments.options), phase_(arguments.phase), summary_(summary), header_(space),
        sums_(space + kUpdateHeader), segments_(update_segments(parameter.columns)), numel_(p_.rows * p_.columns) {
    learning_rate_ = scalar_at<double>(o_.learning_rate, 0);
    double step_size = learning_rate_, correction = 1.0;
    if (kAdam) {
      const double t = static_cast<double>(*p_.step) + 1.0;
      step_size = learning_rate_ / (1.0 - std::pow(o_.beta1, t));
      correction = 1.0 / std::sqrt(1.0 - std::pow(o_.beta2, t));
    }
    k_.b1 = static_cast<C>(o_.beta1);
    k_.c1 = static_cast<C>(1.0 - (kAdam ? o_.beta1 : o_.beta2));
    k_.b2 = static_cast<C>(o_.beta2);
    k_.c2 = static_cast<C>(1.0 - o_.beta2);
    k_.correction = static_cast<C>(correction);
    k_.eps = static_cast<C>(o_.eps);
    k_.keep = C(1);
    k_.step = static_cast<C>(step_size);
    k_.toward = static_cast<C>(1.0 - o_.average_decay);
    rows_per_unit_ = p_.columns < kShortRow && p_.columns > 0 ? kTile / p_.columns : 1;
    groups_ = (p_.rows + rows_per_unit_ - 1) / rows_per_unit_;
  }

  void run() {
    if (p_.projected == 0) {
      if (phase_ == RFK_UPDATE_APPLY) return;
      set_factors(kViewNone);
      elementwise();
      return count_step();
    }
    if (phase_ == RFK_UPDATE_GATHER) {
      gather<true>();
      return summarize(summary_);
    }
    if (phase_ == RFK_UPDATE_APPLY) {
      decide(summary_);
      apply();
      return count_step();
    }
    gather<false>();
    summarize(header_);
    const int view = decide(header_);
    if (summary_ != nullptr) std::memcpy(summary_, header_, RFK_UPDATE_SUMMARY * sizeof(double));
    if (view == kViewNone) {
      elementwise();
    } else if (view == kViewChannel && p_.columns <= kRowBuffer && (groups_ >= max_threads() || numel_ < kSerialElements)) {
      row_by_row();
    } else {
      gather<true>();
      summarize(header_);
      if (view == kViewLayer) header_[kDecidedLayer] = layer_factor(header_);
      apply();
    }
    count_step();
  }

 private:
  // SGDP's update is its momentum buffer, and what the projection leaves of it is what the next step goes on from.
  static constexpr bool kBufferProjected = !kAdam && !kNesterov;

  bool plain() const { return p_.dtype == compute_dtype<C>(); }
  C* first() const { return static_cast<C*>(p_.first); }
  C* second() const { return static_cast<C*>(p_.second); }

  const C* load(const void* base, int32_t dtype, int64_t at, int n, C* buffer) const {
    const char* place = static_cast<const char*>(base) + at * item_size(dtype);
    if (dtype == compute_dtype<C>()) return reinterpret_cast<const C*>(place);
    load_run(place, dtype, 1, n, buffer);
    return buffer;
  }
  const C* grad(int64_t at, int n, Scratch<C>& s) const { return load(p_.grad, p_.dtype, at, n, s.grad); }
  const C* weight(int64_t at, int n, Scratch<C>& s) const { return load(p_.weight, p_.dtype, at, n, s.weight); }

  void count_step() const {
    if (kAdam) *p_.step += 1.0f;
  }

  // elements -------------------------------------------------------------------------------------------------------

  static C update_of(const Factors<C>& k, C g, C m, C v) {
    if constexpr (kAdam) return (kNesterov ? k.b1 * m + k.c1 * g : m) / (root(v) * k.correction + k.eps);
    return kNesterov ? g + k.b1 * m : m;
  }

  // Moves the moments of n elements and leaves their update in u.
  void advance(int64_t at, int n, Scratch<C>& s, C* u) const {
    const C* g = grad(at, n, s);
    C *m = first() + at, *v = kAdam ? second() + at : nullptr;
    const Factors<C> k = k_;
    RFK_INDEPENDENT
    for (int i = 0; i < n; ++i) {
      const C gi = g[i], mi = k.b1 * m[i] + k.c1 * gi;
      C vi = 0;
      m[i] = mi;
      if (kAdam) v[i] = vi = k.b2 * v[i] + (k.c2 * gi) * gi;
      u[i] = update_of(k, gi, mi, vi);
    }
  }

  // The update once more, from moments that were moved before.
  void recall(int64_t at, int n, Scratch<C>& s, C* u) const {
    const C* g = kNesterov ? grad(at, n, s) : nullptr;
    const C *m = first() + at, *v = kAdam ? second() + at : nullptr;
    const Factors<C> k = k_;
    RFK_INDEPENDENT
    for (int i = 0; i < n; ++i) u[i] = update_of(k, kNesterov ? g[i] : C(0), m[i], kAdam ? v[i] : C(0));
  }

  // w = w keep - step (u - factor w), and the average after it. factor points to the row's, or is NULL.
  void move(int64_t at, int n, Scratch<C>& s, const C* u, const C* factor) const {
    char* place = static_cast<char*>(p_.weight) + at * item_size(p_.dtype);
    C* w = plain() ? reinterpret_cast<C*>(place) : s.weight;
    if (!plain()) load_run(place, p_.dtype, 1, n, w);
    const Factors<C> k = k_;
    if (factor != nullptr) {
      const C f = *factor;
      if constexpr (kBufferProjected) {
        C* m = first() + at;
        RFK_INDEPENDENT
        for (int i = 0; i < n; ++i) {
          const C left = u[i] - f * w[i];
          m[i] = left;
          w[i] = w[i] * k.keep - k.step * left;
        }
      } else {
        RFK_INDEPENDENT
        for (int i = 0; i < n; ++i) w[i] = w[i] * k.keep - k.step * (u[i] - f * w[i]);
      }
    } else {
      RFK_INDEPENDENT
      for (int i = 0; i < n; ++i) w[i] = w[i] * k.keep - k.step * u[i];
    }
    if (!plain()) store_run(place, p_.dtype, 1, n, w);
    if (p_.average == nullptr) return;
    if (!plain()) load_run(place, p_.dtype, 1, n, w);  // as stored
    char* mean = static_cast<char*>(p_.average) + at * item_size(p_.average_dtype);
    const bool direct = p_.average_dtype == compute_dtype<C>();
    C* e = direct ? reinterpret_cast<C*>(mean) : s.average;
    if (!direct) load_run(mean, p_.average_dtype, 1, n, e);
    RFK_INDEPENDENT
    for (int i = 0; i < n; ++i) e[i] = e[i] + k.toward * (w[i] - e[i]);
    if (!direct) store_run(mean, p_.average_dtype, 1, n, e);
  }

  // rows -----------------------------------------------------------------------------------------------------------

  // A unit is a segment of a row, or a few short rows. body(first element, rows, columns, first sums) for its tiles: several
  // rows in one tile, or one row in tiles of which the last carries `done`.
  template <class Body>
  void unit_tiles(int64_t unit, const Body& body) const {
    const int64_t row = unit / segments_ * rows_per_unit_, begin = unit % segments_ * RFK_UPDATE_BLOCK;
    double* sums = sums_ + (row * segments_ + unit % segments_) * kUpdateSums;
    if (rows_per_unit_ > 1) {
      const int64_t rows = p_.rows - row < rows_per_unit_ ? p_.rows - row : rows_per_unit_;
      return body(row * p_.columns, static_cast<int>(rows), static_cast<int>(p_.columns), sums, true);
    }
    const int64_t end = begin + RFK_UPDATE_BLOCK < p_.columns ? begin + RFK_UPDATE_BLOCK : p_.columns;
    for (int64_t c = begin; c < end; c += kTile) {
      const int n = end - c < kTile ? static_cast<int>(end - c) : kTile;
      body(row * p_.columns + c, 1, n, sums, c + n == end);
    }
  }

  // Step 1; kAll: the moments too, with sum u w.
  template <bool kAll>
  void gather() const {
    parallel_ranges(groups_ * segments_, 1, numel_, [&](int64_t begin, int64_t end) {
      Scratch<C> s;
      Lanes<C> lanes[kUpdateSums];
      for (int64_t unit = begin; unit < end; ++unit) {
        unit_tiles(unit, [&](int64_t at, int rows, int columns, double* sums, bool done) {
          const int n = rows * columns;
          if (kAll) advance(at, n, s, s.update);
          const C *g = grad(at, n, s), *w = weight(at, n, s);
          for (int r = 0; r < rows; ++r) {
            add_three(columns, g + r * columns, w + r * columns, lanes);
            if (kAll) add_products(columns, s.update + r * columns, w + r * columns, lanes[kSumUw]);
            if (!done) continue;
            for (int k = 0; k < kUpdateSums; ++k) {
              sums[r * kUpdateSums + k] = total(lanes[k]);
              lanes[k] = Lanes<C>();
            }
          }
        });
      }
    });
  }

  // Adds the segments of every row, and the rows: the summary of these rows.
  void summarize(double* summary) const {
    double worst = 0.0, sums[kUpdateSums] = {};
    for (int64_t row = 0; row < p_.rows && segments_ > 0; ++row) {
      double* of_row = sums_ + row * segments_ * kUpdateSums;
      for (int64_t segment = 1; segment < segments_; ++segment) {
        for (int k = 0; k < kUpdateSums; ++k) of_row[k] += of_row[segment * kUpdateSums + k];
      }
      for (int k = 0; k < kUpdateSums; ++k) sums[k] += of_row[k];
      const double cosine = std::fabs(cosine_of(of_row[kSumGw], of_row[kSumGg], of_row[kSumWw]));
      if (!(cosine <= worst)) worst = cosine == cosine ? cosine : HUGE_VAL;
    }
    summary[0] = worst;
    for (int k = 0; k < kUpdateSums; ++k) summary[1 + k] = sums[k];
  }

  double cosine_of(double gw, double gg, double ww) const {
    const double g = std::sqrt(gg), w = std::sqrt(ww);
    return gw / ((g < o_.eps ? o_.eps : g) * (w < o_.eps ? o_.eps : w));
  }

  // sum(u w) / (|w| + eps)^2: u less this times w has nothing along w.
  double factor_of(double uw, double ww) const {
    const double norm = std::sqrt(ww) + o_.eps;
    return uw / (norm * norm);
  }
  double layer_factor(const double* summary) const { return factor_of(summary[1 + kSumUw], summary[1 + kSumWw]); }
  C row_factor(int64_t row) const {
    const double* sums = sums_ + row * segments_ * kUpdateSums;
    return static_cast<C>(factor_of(sums[kSumUw], sums[kSumWw]));
  }

  int decide(const double* summary) {
    const double layer = std::fabs(cosine_of(summary[1 + kSumGw], summary[1 + kSumGg], summary[1 + kSumWw]));
    int view = kViewNone;
    if (layer < o_.delta / std::sqrt(static_cast<double>(p_.total))) view = kViewLayer;
    if (summary[0] < o_.delta / std::sqrt(static_cast<double>(p_.columns))) view = kViewChannel;
    header_[kDecidedView] = view;
    header_[kDecidedLayer] = layer_factor(summary);
    set_factors(view);
    return view;
  }

  void set_factors(int view) {
    double decay = learning_rate_ * o_.weight_decay;
    if (view != kViewNone) decay = decay * o_.decay_ratio;
    if (!kAdam && o_.weight_decay > 0.0) decay = decay / (1.0 - o_.beta1);
    k_.keep = o_.weight_decay > 0.0 ? static_cast<C>(1.0 - decay) : C(1);
  }

  // The last run of the range first, but forwards inside a run: the prefetchers of the CPU lose a stream that jumps back.
  template <class Body>
  void backwards(int64_t begin, int64_t end, int64_t elements, const Body& body) const {
    const int64_t run = kRun / (elements > 0 ? elements : 1) + 1;
    for (int64_t last = end; last > begin; last -= run) {
      for (int64_t k = last - run < begin ? begin : last - run; k < last; ++k) body(k);
    }
  }

  // step 2 ---------------------------------------------------------------------------------------------------------

  // Nothing is projected: every element by itself.
  void elementwise() const {
    parallel_ranges((numel_ + kTile - 1) / kTile, 1, numel_, [&](int64_t begin, int64_t end) {
      Scratch<C> s;
      backwards(begin, end, kTile, [&](int64_t tile) {
        const int64_t at = tile * kTile;
        const int n = numel_ - at < kTile ? static_cast<int>(numel_ - at) : kTile;
        advance(at, n, s, s.update);
        move(at, n, s, s.update, nullptr);
      });
    });
  }

  // Every row is projected, and short enough for its update to wait until sum u w is known.
  void row_by_row() const {
    parallel_ranges(groups_, 1, numel_, [&](int64_t begin, int64_t end) {
      Scratch<C> s;
      Lanes<C> lanes;
      backwards(begin, end, rows_per_unit_ * p_.columns, [&](int64_t group) {
        const int64_t start = group * rows_per_unit_ * p_.columns;
        for (int64_t segment = 0; segment < segments_; ++segment) {
          unit_tiles(group * segments_ + segment, [&](int64_t at, int rows, int columns, double* sums, bool done) {
            C* u = s.update + (at - start);
            advance(at, rows * columns, s, u);
            const C* w = weight(at, rows * columns, s);
            for (int r = 0; r < rows; ++r) {
              add_products(columns, u + r * columns, w + r * columns, lanes);
              if (!done) continue;
              sums[r * kUpdateSums + kSumUw] = total(lanes);
              lanes = Lanes<C>();
            }
          });
        }
        if (segments_ > 1) {
          double* sums = sums_ + group * segments_ * kUpdateSums;
          for (int64_t k = 1; k < segments_; ++k) sums[kSumUw] += sums[k * kUpdateSums + kSumUw];
        }
        for (int64_t segment = 0; segment < segments_; ++segment) move_unit(group * segments_ + segment, s, start, false);
      });
    });
  }

  // The weights of a unit; kAgain: their update from the moments, else it is in s.update from element `start` on.
  void move_unit(int64_t unit, Scratch<C>& s, int64_t start, bool again) const {
    const int view = static_cast<int>(header_[kDecidedView]);
    const C layer = static_cast<C>(header_[kDecidedLayer]);
    const int64_t first_row = unit / segments_ * rows_per_unit_;
    unit_tiles(unit, [&](int64_t at, int rows, int columns, double*, bool) {
      C* u = again ? s.update : s.update + (at - start);
      if (again) recall(at, rows * columns, s, u);
      if (view != kViewChannel) return move(at, rows * columns, s, u, view == kViewLayer ? &layer : nullptr);
      for (int r = 0; r < rows; ++r) {
        const C factor = row_factor(first_row + r);
        move(at + r * columns, columns, s, u + r * columns, &factor);
      }
    });
  }

  // The second half of step 2 where it falls apart.
  void apply() const {
    parallel_ranges(groups_ * segments_, 1, numel_, [&](int64_t begin, int64_t end) {
      Scratch<C> s;
      backwards(begin, end, rows_per_unit_ * p_.columns / segments_, [&](int64_t unit) { move_unit(unit, s, 0, true); });
    });
  }

  const rfk_update_parameter& p_;
  const rfk_update_options& o_;
  const int phase_;
  double *summary_, *header_, *sums_;
  const int64_t segments_, numel_;
  int64_t rows_per_unit_ = 1, groups_ = 0;
  double learning_rate_;
  Factors<C> k_;
};

template <class C>
void one(const rfk_update_parameter& p, const UpdateArguments& a, double* summary, double* space) {
  const bool nesterov = a.options->nesterov != 0;
  if (a.options->rule == RFK_UPDATE_ADAMP) {
    nesterov ? Update<C, true, true>(p, a, summary, space).run() : Update<C, true, false>(p, a, summary, space).run();
  } else {
    nesterov ? Update<C, false, true>(p, a, summary, space).run() : Update<C, false, false>(p, a, summary, space).run();
  }
}

}  // namespace

// Large parameters one after another, each shared by all threads; small ones side by side, one thread each.
void projected_update(const UpdateArguments& a) {
  const auto numel = [&](int64_t k) { return a.parameters[k].rows * a.parameters[k].columns; };
  const auto call = [&](int64_t k, int64_t offset) {
    double* summary = a.summary != nullptr ? a.summary + k * RFK_UPDATE_SUMMARY : nullptr;
    const auto chosen = a.parameters[k].dtype == RFK_FLOAT64 ? one<double> : one<float>;
    chosen(a.parameters[k], a, summary, a.workspace + offset);
  };
  int64_t offset = 0, small = 0;
  for (int64_t k = 0; k < a.count; ++k) {
    if (numel(k) >= kSerialElements) {
      call(k, offset);
    } else {
      small += numel(k);
    }
    offset += update_doubles(a.parameters[k]);
  }
  const int64_t share = small / kSerialElements;  // threads that small parameters are worth waking
  const int threads = share < max_threads() ? static_cast<int>(share) + 1 : max_threads();
  const int64_t tasks = 4 * threads;  // more than threads: parameters differ in size
  parallel_tasks(tasks, threads, [&](int64_t task, int) {
    int64_t begin = 0;
    for (int64_t k = 0; k < a.count; ++k) {
      if (numel(k) < kSerialElements && k * tasks / a.count == task) call(k, begin);
      begin += update_doubles(a.parameters[k]);
    }
  });
}

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
