// fast_step.h: see fast_step.cpp.
#ifndef RFK_PYTHON_FAST_STEP_H_
#define RFK_PYTHON_FAST_STEP_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// True: done, `out` holds the step. False: not a plain case, nothing was written.
bool fast_euler_step(pybind11::handle x, pybind11::handle v, pybind11::handle v_uncond, pybind11::handle dt,
                     pybind11::handle guidance, pybind11::handle out, bool grad_enabled);

}  // namespace rfk_python

#endif  // RFK_PYTHON_FAST_STEP_H_
