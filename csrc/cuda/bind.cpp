// The only file of _cuda that knows Python. Device pointers and the stream come as integers.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cosine_max.h"

namespace py = pybind11;
using namespace dinofast;

namespace {

std::string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why kernels cannot run on this machine's driver; empty when they can.
std::string driver_problem() {
    int driver = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess) return std::string("no NVIDIA driver: ") + cudaGetErrorString(error);
    if (driver == 0) return "no NVIDIA driver on this machine";
    if (driver / 1000 < CUDART_VERSION / 1000) {
        return "built with CUDA " + version(CUDART_VERSION) + ", the driver serves up to " + version(driver) +
               "; update the driver or build with an older toolkit";
    }
    return "";
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("FLOAT32") = static_cast<int>(Element::float32);
    m.attr("BFLOAT16") = static_cast<int>(Element::bfloat16);
    m.attr("FLOAT16") = static_cast<int>(Element::float16);
    m.attr("ARCHS") = py::make_tuple(DINOFAST_ARCHS);  // compute capabilities, 80 for 8.0
    m.def("driver_problem", driver_problem, "Say why this machine's driver cannot run the kernels, or ''.");
    m.def(
        "cosine_max",
        [](uintptr_t features, int64_t n, int64_t features_stride, uintptr_t prototypes, int64_t k,
           int64_t prototypes_stride, int64_t d, int element, uintptr_t similarity, uintptr_t index,
           uintptr_t keys, uintptr_t scales, int device, uintptr_t stream) {
            const DeviceRows left{reinterpret_cast<const void*>(features), n, features_stride};
            const DeviceRows right{reinterpret_cast<const void*>(prototypes), k, prototypes_stride};
            py::gil_scoped_release release;
            cosine_max(left, right, d, static_cast<Element>(element), reinterpret_cast<float*>(similarity),
                       reinterpret_cast<int64_t*>(index), reinterpret_cast<uint64_t*>(keys),
                       reinterpret_cast<float*>(scales), device, reinterpret_cast<void*>(stream));
        },
        "Fill similarity (N,) float32 and index (N,) int64 on the device; keys (N,) int64 and scales (N + K, "
        "2) "
        "float32 are workspace; rows may be strided, channels must be contiguous.");
}
