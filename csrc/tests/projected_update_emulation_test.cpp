// projected_update_emulation_test.cpp: the CUDA kernels of projected_update, run on the CPU (emulation/cuda_runtime.h).
//
// Random steps against the formulas in double, the threads of a block in ascending and in descending order with the same bits;
// in one call and in the two of sharded parameters. Built as cuda_emulation_test.cpp says.
// Arguments: number of random calls (default 20).
#include <cstdarg>

#include "core/update_layout.h"
#include "cuda/cuda_ops.h"
#include "cuda_runtime.h"
#include "update_checks.h"

namespace rfk {
void set_error(const char* format, ...);
void set_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}
}  // namespace rfk

using namespace rfk_test;

namespace {

void one(Dice& dice) {
  UpdateProblem problem(dice);
  const rfk_device device = {RFK_CUDA, 1, nullptr};
  int64_t doubles = 0;
  for (const rfk_update_parameter& p : problem.table) doubles += rfk::update_doubles(p);
  std::string first[2];
  for (int order = 0; order < 2; ++order) {
    emulation::descending = order == 1;
    for (int phased = 0; phased < 2; ++phased) {
      const std::string where = std::string(order ? "descending" : "ascending") + (phased ? ", two phases" : "");
      std::unique_ptr<double[]> workspace(new double[static_cast<size_t>(doubles)]);
      std::fill_n(workspace.get(), doubles, NAN);
      std::vector<double> summary(static_cast<size_t>(problem.count() * RFK_UPDATE_SUMMARY));
      const auto call = [&](int phase, double* place) {
        const uint64_t before = rfk::cuda::launch_count(RFK_OP_PROJECTED_UPDATE);
        CHECK(rfk::cuda::projected_update(device, problem.table.data(), problem.count(), problem.options, phase, place,
                                          workspace.get()) == RFK_OK, "status");
        return rfk::cuda::launch_count(RFK_OP_PROJECTED_UPDATE) - before;
      };
      problem.restore();
      if (phased) {
        call(RFK_UPDATE_GATHER, summary.data());
        problem.check_summary(where, summary.data());
        call(RFK_UPDATE_APPLY, summary.data());
      } else {
        const uint64_t launches = call(RFK_UPDATE_WHOLE, nullptr);
        CHECK(problem.count() > 1 || launches <= (problem.any_projected() ? 3u : 2u), "launches");
      }
      problem.check(where);
      const std::string bytes = problem.bytes();
      if (first[phased].empty()) first[phased] = bytes;
      CHECK(bytes == first[phased], "orders differ: %s", where.c_str());
    }
    CHECK(first[0] == first[1], "one call and two differ");
  }
  CHECK(emulation::current_device == 0, "the caller's device");
}

}  // namespace

int main(int argc, char** argv) {
  Dice dice{12};
  const int calls = argc > 1 ? std::atoi(argv[1]) : 20;
  for (int round = 0; round < calls; ++round) one(dice);
  std::printf("projected_update: %d calls\n", calls);
  return 0;
}
