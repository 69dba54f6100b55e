// SPDX-License-Identifier: Apache-2.0
// The exceptions of the package, and how the core's failures become them.
#pragma once

#include <pybind11/pybind11.h>

namespace m2n::bindings {

// Makes m2n.Error and its subclasses and translates m2n::Error into them.
void bind_errors(pybind11::module_& module);

}  // namespace m2n::bindings
