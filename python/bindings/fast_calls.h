// fast_calls.h: see fast_calls.cpp. None or False: not a plain case, nothing was written.
#ifndef RFK_PYTHON_FAST_CALLS_H_
#define RFK_PYTHON_FAST_CALLS_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// fast_step(form, x, tensors, coefficients, x_coefficient, out, cast): the state, or (state, copy) where cast is not None.
// form: see Form in fast_calls.cpp. out: None for new memory, or a tensor. cast: None, the dtype of a new copy, or a tensor
// for it. A plain function of CPython's: pybind11's conversions cost 0.2 us, a tenth of the call.
void define_fast_step(pybind11::module_& m);

// path: an rfk_path other than RFK_PATH_CUSTOM. x0: None or a tensor; seed and offset: Python ints where x0 is None.
bool fast_interpolate(pybind11::handle x1, pybind11::handle x0, pybind11::handle t, int path, pybind11::handle seed,
                      pybind11::handle offset, pybind11::handle xt, pybind11::handle target);

}  // namespace rfk_python

#endif  // RFK_PYTHON_FAST_CALLS_H_
