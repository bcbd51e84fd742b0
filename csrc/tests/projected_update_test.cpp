// projected_update_test.cpp: random AdamP and SGDP steps at every level against the formulas in double; the levels agree in
// bits, in one call and in the two of sharded parameters; invalid arguments are refused and write nothing.
#include "update_checks.h"

using namespace rfk_test;

namespace {

void one(Dice& dice) {
  UpdateProblem problem(dice);
  const size_t doubles = static_cast<size_t>(rfk_projected_update_workspace(problem.table.data(), problem.count()));
  std::string first[2];
  at_every_level(RFK_OP_PROJECTED_UPDATE, [&](const char* level) {
    std::vector<double> workspace(doubles), summary(static_cast<size_t>(problem.count() * RFK_UPDATE_SUMMARY));
    const auto call = [&](int phase, double* where) {
      CHECK(rfk_projected_update(&kCpuDevice, problem.table.data(), problem.count(), &problem.options, phase, where,
                                 workspace.data()) == RFK_OK,
            "%s", rfk_last_error());
    };
    for (int phased = 0; phased < 2; ++phased) {
      problem.restore();
      if (phased) {
        call(RFK_UPDATE_GATHER, summary.data());
        problem.check_summary(level, summary.data());
        call(RFK_UPDATE_APPLY, summary.data());
      } else {
        call(RFK_UPDATE_WHOLE, dice.roll(2) ? summary.data() : nullptr);
      }
      problem.check(std::string(level) + (phased ? ", two phases" : ""));
      const std::string bytes = problem.bytes();
      if (first[phased].empty()) first[phased] = bytes;
      CHECK(bytes == first[phased], "levels differ: %s", level);
    }
    CHECK(first[0] == first[1], "one call and two differ: %s", level);
  });
}

void refused(const char* part, const rfk_update_parameter* p, int64_t count, const rfk_update_options* o, int phase,
             double* summary, double* workspace) {
  CHECK(rfk_projected_update(&kCpuDevice, p, count, o, phase, summary, workspace) == RFK_INVALID, "accepted: %s", part);
  CHECK(std::string(rfk_last_error()).find(part) != std::string::npos, "'%s' is not in '%s'", part, rfk_last_error());
}

void invalid_arguments() {
  Dice dice{5};
  UpdateProblem problem(dice);
  const rfk_update_options good = problem.options;
  rfk_update_options options = good;
  double space[64];
  const std::string before = problem.bytes();
  const rfk_update_parameter* p = problem.table.data();
  options.rule = 2;
  refused("a known rule", p, 1, &options, 0, nullptr, space);
  refused("a known rule", p, 1, nullptr, 0, nullptr, space);
  refused("the phase must be", p, 1, &good, 3, nullptr, space);
  refused("the phase must be", p, 1, &good, RFK_UPDATE_GATHER, nullptr, space);
  refused("a workspace", p, 1, &good, 0, nullptr, nullptr);
  refused("a workspace", nullptr, 1, &good, 0, nullptr, space);
  for (int k = 0; k < 5; ++k) {
    rfk_update_parameter bad{2, 3, 6, space, space, space, space, nullptr, nullptr, 0, 0, 1};
    options = good;
    options.rule = RFK_UPDATE_ADAMP;
    if (k == 0) bad.dtype = 7;
    if (k == 1) bad.rows = -1;
    if (k == 2) bad.total = 5;
    if (k == 3) bad.weight = nullptr;
    refused(k < 3 ? "rows x columns" : "lacks a weight", &bad, 1, &options, 0, nullptr, space);
  }
  CHECK(rfk_projected_update(&kCpuDevice, nullptr, 0, &good, 0, nullptr, nullptr) == RFK_OK, "no parameters");
  CHECK(problem.bytes() == before, "a refused call wrote something");
}

}  // namespace

int main(int argc, char** argv) {
  Dice dice{11};
  for (int round = 0; round < rounds(argc, argv); ++round) one(dice);
  invalid_arguments();
  std::puts("projected_update: passed");
  return 0;
}
