// fast_step.h: see fast_step.cpp.
#ifndef RFK_PYTHON_FAST_STEP_H_
#define RFK_PYTHON_FAST_STEP_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// form: see Form in fast_step.cpp. True: done, `out` holds the step. False: not a plain case, nothing was written.
bool fast_step(int form, pybind11::handle x, pybind11::tuple tensors, pybind11::tuple coefficients,
               pybind11::handle x_coefficient, pybind11::handle out, bool grad_enabled);

}  // namespace rfk_python

#endif  // RFK_PYTHON_FAST_STEP_H_
