// projected_update.h: one optimizer step on many parameters; see projected_update.cpp.
#ifndef RFK_PYTHON_PROJECTED_UPDATE_H_
#define RFK_PYTHON_PROJECTED_UPDATE_H_

#include <pybind11/pybind11.h>

namespace rfk_python {

// Adds projected_update and projected_update_workspace to the module.
void define_projected_update(pybind11::module_& m);

}  // namespace rfk_python

#endif  // RFK_PYTHON_PROJECTED_UPDATE_H_
