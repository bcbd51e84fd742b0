// attention.h: attention and its quantization on CPU tensors; see attention.cpp.
#ifndef RFK_PYTHON_ATTENTION_H_
#define RFK_PYTHON_ATTENTION_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// Adds attention, quantize_keys, quantize_queries and quantized_layout to the module.
void define_attention(pybind11::module_& m);

}  // namespace rfk_python

#endif  // RFK_PYTHON_ATTENTION_H_
