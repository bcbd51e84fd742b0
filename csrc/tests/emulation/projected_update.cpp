// The CUDA source as C++, for cuda_emulation_test.
#include "cuda/projected_update.cu"
