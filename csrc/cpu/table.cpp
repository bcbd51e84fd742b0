// table.cpp: the kernels of this instruction set level.
#include "cpu/cpu_ops.h"

namespace rfk {
namespace RFK_ISA_NAMESPACE {

void step(const StepArguments& arguments);
void interpolate(const InterpolateArguments& arguments);
void flow_loss(const LossArguments& arguments);
void random(const RandomArguments& arguments);
void projected_update(const UpdateArguments& arguments);

extern const CpuOps kOps = {step, interpolate, flow_loss, random, projected_update};

}  // namespace RFK_ISA_NAMESPACE
}  // namespace rfk
