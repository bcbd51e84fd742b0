// The CUDA source as C++, for quantize_emulation_test.
#include "cuda/quantize.cu"
