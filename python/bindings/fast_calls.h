// fast_calls.h: see fast_calls.cpp. True: done, the outputs are written. False: not a plain case, nothing was written.
#ifndef RFK_PYTHON_FAST_CALLS_H_
#define RFK_PYTHON_FAST_CALLS_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// form: see Form in fast_calls.cpp. cast: None or a tensor for the copy.
bool fast_step(int form, pybind11::handle x, pybind11::tuple tensors, pybind11::tuple coefficients,
               pybind11::handle x_coefficient, pybind11::handle out, pybind11::handle cast, bool grad_enabled);

// path: an rfk_path other than RFK_PATH_CUSTOM. x0: None or a tensor; seed and offset: Python ints where x0 is None.
bool fast_interpolate(pybind11::handle x1, pybind11::handle x0, pybind11::handle t, int path, pybind11::handle seed,
                      pybind11::handle offset, pybind11::handle xt, pybind11::handle target, bool grad_enabled);

}  // namespace rfk_python

#endif  // RFK_PYTHON_FAST_CALLS_H_
