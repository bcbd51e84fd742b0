// update_checks.h: random optimizer steps for the tests of projected_update, and what they must give, in double.
//
// The expected values follow the formulas of rfk.h on the stored numbers without any rounding; each result may be off by the
// roundings that a kernel of type C makes on the way, counted below. Memory ends where the elements do.
#ifndef RFK_TESTS_UPDATE_CHECKS_H_
#define RFK_TESTS_UPDATE_CHECKS_H_

#include <memory>
#include <string>

#include "checks.h"

namespace rfk_test {

// One tensor's memory, its elements as doubles.
class Numbers {
 public:
  Numbers(int dtype, int64_t count) : dtype_(dtype), bytes_(new char[static_cast<size_t>(count * item_size(dtype)) + 1]) {
    values.resize(static_cast<size_t>(count));
  }
  // Stores the values, and keeps them as stored.
  void store() {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = stored(dtype_, values[i]);
      write_value(dtype_, data() + static_cast<int64_t>(i) * item_size(dtype_), values[i]);
    }
  }
  double get(size_t i) const { return read_value(dtype_, bytes_.get() + static_cast<int64_t>(i) * item_size(dtype_)); }
  char* data() { return bytes_.get(); }
  std::string bytes() const { return {bytes_.get(), values.size() * static_cast<size_t>(item_size(dtype_))}; }

  std::vector<double> values;

 private:
  int dtype_;
  std::unique_ptr<char[]> bytes_;
};

struct Parameter {
  Parameter(int dtype, int average, int64_t rows, int64_t columns)
      : dtype_(dtype), weight(dtype, rows * columns), grad(dtype, rows * columns), first(state(), rows * columns),
        second(state(), rows * columns), average_(average, rows * columns) {
    view = rfk_update_parameter{};
    view.rows = rows;
    view.columns = columns;
    view.total = rows * columns;
    view.dtype = dtype;
    view.average_dtype = average;
  }
  int state() const { return dtype_ == RFK_FLOAT64 ? RFK_FLOAT64 : RFK_FLOAT32; }
  void restore() {
    for (Numbers* n : {&weight, &grad, &first, &second, &average_}) n->store();
    step = steps;
  }

  int dtype_;
  Numbers weight, grad, first, second, average_;
  float steps = 0.0f, step = 0.0f;
  rfk_update_parameter view;
  // Expected values and how far off they may be.
  std::vector<double> want[4], slack[4];  // first, second, weight, average
  double worst = 0.0, sums[4] = {};
  int viewed = 0;
};

class UpdateProblem {
 public:
  rfk_update_options options{};
  std::vector<std::unique_ptr<Parameter>> parameters;
  std::vector<rfk_update_parameter> table;

  explicit UpdateProblem(Dice& dice) : rate_type_(dice.roll(4)) {
    options.rule = dice.roll(2);
    options.nesterov = dice.roll(2);
    options.beta1 = dice.roll(3) ? 0.9 : 0.5;
    options.beta2 = adam() ? (dice.roll(3) ? 0.999 : 0.9) : (dice.roll(2) ? 0.0 : 0.25);
    options.eps = 1e-8;
    options.weight_decay = dice.roll(2) ? 0.0 : 0.3;
    options.delta = 0.1;
    options.decay_ratio = dice.roll(2) ? 0.1 : 0.0;
    options.average_decay = 0.75;
    write_value(rate_type_, rate_, stored(rate_type_, 0.0625));
    options.learning_rate = {0.0625, dice.roll(2) ? rate_ : nullptr, 0, rate_type_};
    static const int64_t shapes[][2] = {{1, 1},  {3, 7},     {1, 0},   {0, 5},   {5, 64},    {130, 4}, {2, 4096}, {3, 4100},
                                        {1, 9001}, {70, 9}, {2, 513}, {4, 1028}, {1, 20004}, {300, 1}, {3, 255}, {40, 36}};
    const int count = dice.roll(8) == 0 ? 30 : 1 + dice.roll(3);
    for (int k = 0; k < count; ++k) {
      const int64_t* shape = shapes[dice.roll(count > 20 ? 7 : 16)];
      const int dtype = dice.roll(4);
      parameters.emplace_back(new Parameter(dtype, dice.roll(4), shape[0], shape[1]));
      Parameter& p = *parameters.back();
      p.view.projected = dice.roll(4) != 0;
      p.steps = static_cast<float>(dice.roll(3) ? dice.roll(50) : 0);
      if (dice.roll(8) == 0) p.view.total *= 4;
      fill(dice, p);
      p.restore();
      p.view.weight = p.weight.data();
      p.view.grad = p.grad.data();
      p.view.first = p.first.data();
      p.view.second = adam() ? p.second.data() : nullptr;
      p.view.step = adam() ? &p.step : nullptr;
      p.view.average = dice.roll(2) ? p.average_.data() : nullptr;
      expect(p);
      table.push_back(p.view);
    }
  }
  UpdateProblem(const UpdateProblem&) = delete;
  UpdateProblem& operator=(const UpdateProblem&) = delete;

  bool adam() const { return options.rule == RFK_UPDATE_ADAMP; }
  int64_t count() const { return static_cast<int64_t>(table.size()); }
  bool any_projected() const {
    for (const auto& p : table) {
      if (p.projected) return true;
    }
    return false;
  }
  void restore() {
    for (auto& p : parameters) p->restore();
  }

  void check(const std::string& where) const {
    for (size_t k = 0; k < parameters.size(); ++k) {
      const Parameter& p = *parameters[k];
      const Numbers* found[] = {&p.first, &p.second, &p.weight, &p.average_};
      static const char* names[] = {"first", "second", "weight", "average"};
      for (int n = 0; n < 4; ++n) {
        for (size_t i = 0; i < found[n]->values.size(); ++i) {
          const double got = found[n]->get(i), want = p.want[n][i];
          CHECK(std::fabs(got - want) <= p.slack[n][i], "%s: %s[%zu] of parameter %zu (%lld x %lld, dtype %d, view %d): %.9g, not %.9g, off by %g of %g",
                where.c_str(), names[n], i, k, static_cast<long long>(p.view.rows), static_cast<long long>(p.view.columns),
                p.dtype_, p.viewed, got, want, std::fabs(got - want), p.slack[n][i]);
        }
      }
      CHECK(p.step == p.steps + (adam() ? 1.0f : 0.0f), "%s: step of parameter %zu", where.c_str(), k);
    }
  }
  // The summaries that a gathering call leaves.
  void check_summary(const std::string& where, const double* summary) const {
    for (size_t k = 0; k < parameters.size(); ++k, summary += RFK_UPDATE_SUMMARY) {
      const Parameter& p = *parameters[k];
      if (!p.view.projected) continue;
      const double unit = p.state() == RFK_FLOAT64 ? 1e-13 : 1e-4;
      CHECK(std::fabs(summary[0] - p.worst) <= unit, "%s: greatest cosine %g, not %g", where.c_str(), summary[0], p.worst);
      for (int s = 0; s < 4; ++s) {
        const double size = 1.0 + std::fabs(p.sums[s]) + std::sqrt(p.sums[1] * p.sums[2]) + std::fabs(p.sums[3]);
        CHECK(std::fabs(summary[1 + s] - p.sums[s]) <= 40 * unit * size, "%s: sum %d %.9g, not %.9g", where.c_str(), s,
              summary[1 + s], p.sums[s]);
      }
    }
  }
  // Everything the call may have written, to compare runs bit for bit.
  std::string bytes() const {
    std::string all;
    for (const auto& p : parameters) all += p->first.bytes() + p->second.bytes() + p->weight.bytes() + p->average_.bytes();
    return all;
  }

 private:
  // Gradients of three kinds: any, none along w in every row, none along w in the whole. Rounding to a narrow dtype leaves
  // some, which counts like any other: what is expected follows the stored numbers.
  void fill(Dice& dice, Parameter& p) {
    const int kind = dice.roll(3);
    const int64_t rows = kind == 1 ? p.view.rows : 1, length = rows > 0 ? p.view.rows * p.view.columns / rows : 0;
    const bool fresh = p.steps == 0.0f;
    for (size_t i = 0; i < p.weight.values.size(); ++i) {
      p.weight.values[i] = dice.real() * 0.25;
      p.grad.values[i] = dice.real() * 0.5;
      p.first.values[i] = fresh ? 0.0 : dice.real() * 0.1;
      p.second.values[i] = fresh ? 0.0 : std::fabs(dice.real()) * 0.1;
      p.average_.values[i] = dice.real();
    }
    for (int64_t r = 0; kind > 0 && r < rows; ++r) {
      double gw = 0.0, ww = 0.0;
      for (int64_t i = r * length; i < (r + 1) * length; ++i) {
        gw += p.grad.values[static_cast<size_t>(i)] * p.weight.values[static_cast<size_t>(i)];
        ww += p.weight.values[static_cast<size_t>(i)] * p.weight.values[static_cast<size_t>(i)];
      }
      for (int64_t i = r * length; ww > 0.0 && i < (r + 1) * length; ++i) {
        p.grad.values[static_cast<size_t>(i)] -= p.weight.values[static_cast<size_t>(i)] * gw / ww;
      }
    }
    // A few rows of zeros: both norms at eps.
    if (p.view.rows > 2 && dice.roll(4) == 0) {
      for (int64_t i = 0; i < p.view.columns; ++i) p.weight.values[static_cast<size_t>(i)] = 0.0;
    }
  }

  double cosine(double gw, double gg, double ww) const {
    return std::fabs(gw) / (std::fmax(std::sqrt(gg), options.eps) * std::fmax(std::sqrt(ww), options.eps));
  }

  void expect(Parameter& p) {
    const bool narrow = p.state() == RFK_FLOAT32;
    const double unit = narrow ? 0x1p-24 : 0x1p-53, b1 = options.beta1, t = static_cast<double>(p.steps) + 1.0;
    const double rate = options.learning_rate.data ? read_value(rate_type_, rate_) : options.learning_rate.value;
    const size_t n = p.weight.values.size(), columns = static_cast<size_t>(p.view.columns);
    for (int k = 0; k < 4; ++k) p.want[k].assign(n, 0.0), p.slack[k].assign(n, 0.0);
    std::vector<double> u(n), du(n);  // the update, and its error
    for (size_t i = 0; i < n; ++i) {
      const double g = p.grad.values[i], c1 = 1.0 - (adam() ? b1 : options.beta2);
      const double size = std::fabs(b1 * p.first.values[i]) + std::fabs(c1 * g);
      const double m = b1 * p.first.values[i] + c1 * g;
      p.want[0][i] = m;
      p.slack[0][i] = 4 * unit * size;
      p.want[1][i] = p.second.values[i];
      const double top = options.nesterov ? b1 * m + c1 * g : m, top_size = size + (options.nesterov ? std::fabs(c1 * g) : 0.0);
      if (adam()) {
        const double v = options.beta2 * p.second.values[i] + (1.0 - options.beta2) * g * g;
        p.want[1][i] = v;
        p.slack[1][i] = 6 * unit * v + 1e-44;
        const double bottom = std::sqrt(v) / std::sqrt(1.0 - std::pow(options.beta2, t)) + options.eps;
        u[i] = top / bottom;
        du[i] = 20 * unit * top_size / bottom;
      } else {
        u[i] = options.nesterov ? g + b1 * m : m;
        du[i] = 8 * unit * (size + std::fabs(g));
      }
    }
    // Rows, then the whole.
    std::vector<double> factor(static_cast<size_t>(p.view.rows), 0.0), row_error(factor.size(), 0.0);
    double error = 0.0;
    p.worst = 0.0;
    for (double& s : p.sums) s = 0.0;
    for (size_t r = 0; r < factor.size(); ++r) {
      double s[4] = {}, own = 0.0;
      for (size_t i = r * columns; i < (r + 1) * columns; ++i) {
        const double g = p.grad.values[i], w = p.weight.values[i];
        s[0] += g * w;
        s[1] += g * g;
        s[2] += w * w;
        s[3] += u[i] * w;
        own += (du[i] + 300 * unit * std::fabs(u[i])) * std::fabs(w);
      }
      p.worst = std::fmax(p.worst, cosine(s[0], s[1], s[2]));
      const double norm = std::sqrt(s[2]) + options.eps;
      factor[r] = s[3] / (norm * norm);
      row_error[r] = own / (norm * norm) + 300 * unit * std::fabs(factor[r]);
      for (int k = 0; k < 4; ++k) p.sums[k] += s[k];
      error += own;
    }
    const double limit = options.delta / std::sqrt(static_cast<double>(columns));
    const double layer_limit = options.delta / std::sqrt(static_cast<double>(p.view.total));
    const double layer = cosine(p.sums[0], p.sums[1], p.sums[2]);
    // What the kernel's rounding could tip over is not asked: the parameter is not projected then.
    const double tip = narrow ? 1e-4 : 1e-12;
    if (std::fabs(p.worst - limit) < tip || std::fabs(layer - layer_limit) < tip) p.view.projected = 0;
    p.viewed = !p.view.projected ? 0 : p.worst < limit ? 1 : layer < layer_limit ? 2 : 0;
    const double norm = std::sqrt(p.sums[2]) + options.eps;
    double keep = rate * options.weight_decay * (p.viewed ? options.decay_ratio : 1.0);
    if (!adam()) keep /= 1.0 - b1;
    keep = 1.0 - keep;
    const double step = adam() ? rate / (1.0 - std::pow(b1, t)) : rate;
    for (size_t i = 0; i < n; ++i) {
      const double w = p.weight.values[i];
      const double f = p.viewed == 1 ? factor[i / columns] : p.viewed == 2 ? p.sums[3] / (norm * norm) : 0.0;
      const double df = p.viewed == 1 ? row_error[i / columns] : p.viewed == 2 ? error / (norm * norm) + 300 * unit * std::fabs(f) : 0.0;
      const double left = u[i] - f * w, dleft = du[i] + df * std::fabs(w) + 4 * unit * (std::fabs(u[i]) + std::fabs(f * w));
      if (!adam() && !options.nesterov && p.viewed) {
        p.want[0][i] = left;
        p.slack[0][i] = dleft;
      }
      const double moved = w * keep - step * left;
      const double dmoved = step * (dleft + 4 * unit * std::fabs(left)) + 4 * unit * std::fabs(w);
      p.want[2][i] = moved;
      p.slack[2][i] = dmoved + spacing(p.dtype_, moved, dmoved);
      const double a = p.average_.values[i], toward = 1.0 - options.average_decay;
      p.want[3][i] = p.view.average ? a + toward * (moved - a) : a;
      const double drift = toward * p.slack[2][i] + 6 * unit * (std::fabs(a) + std::fabs(moved));
      p.slack[3][i] = p.view.average ? drift + spacing(p.view.average_dtype, p.want[3][i], drift) : 0.0;
    }
  }

  // Rounding a value of this size to the dtype.
  static double spacing(int dtype, double value, double error) {
    const double unit = dtype == RFK_FLOAT64 ? 0x1p-53 : dtype == RFK_FLOAT32 ? 0x1p-24 : dtype == RFK_BFLOAT16 ? 0x1p-8 : 0x1p-11;
    return 1.01 * unit * (std::fabs(value) + error) + (dtype == RFK_FLOAT16 ? 0x1p-25 : 1e-45);
  }

  int rate_type_;
  alignas(8) char rate_[8] = {};
};

}  // namespace rfk_test

#endif  // RFK_TESTS_UPDATE_CHECKS_H_
