// The checks in front of the kernels, for quantize_emulation_test.
#include "core/quantize_cuda.cpp"
