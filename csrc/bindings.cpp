// The Python module flowmo_kernels._C: one function per launcher, integers and floats in, CUDA's error code out.
#include <pybind11/pybind11.h>

#include "launchers.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Launchers of FlowMo's CUDA kernels: addresses, sizes, strides and a stream as integers.";
#define BIND(name) module.def(#name, &name);
    FLOWMO_LAUNCHERS(BIND)
#undef BIND
    module.def("error_text", &error_text, "CUDA's message for an error code.");
    module.def("set_device", &set_device, "Makes a device current for this module's launches; returns an error code.");
}
