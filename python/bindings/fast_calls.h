// fast_calls.h: see fast_calls.cpp. None or False: not a plain case, nothing was written.
#ifndef RFK_PYTHON_FAST_CALLS_H_
#define RFK_PYTHON_FAST_CALLS_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// The state, or (state, copy) where cast is not None. form: see Form in fast_calls.cpp. out: None for new memory, or a
// tensor. cast: None, the dtype of a new copy, or a tensor for it.
pybind11::object fast_step(int form, pybind11::handle x, pybind11::tuple tensors, pybind11::tuple coefficients,
                           pybind11::handle x_coefficient, pybind11::handle out, pybind11::handle cast);

// path: an rfk_path other than RFK_PATH_CUSTOM. x0: None or a tensor; seed and offset: Python ints where x0 is None.
bool fast_interpolate(pybind11::handle x1, pybind11::handle x0, pybind11::handle t, int path, pybind11::handle seed,
                      pybind11::handle offset, pybind11::handle xt, pybind11::handle target);

}  // namespace rfk_python

#endif  // RFK_PYTHON_FAST_CALLS_H_
