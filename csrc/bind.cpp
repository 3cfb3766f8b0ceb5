// The only file of _native that knows Python. Pointers come as integers; callers have checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cosine_max.h"
#include "cpu/dpm_stats.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace dinofast;

PYBIND11_MODULE(_native, m) {
    m.attr("FLOAT32") = static_cast<int>(Element::float32);
    m.attr("BFLOAT16") = static_cast<int>(Element::bfloat16);
    m.attr("FLOAT16") = static_cast<int>(Element::float16);
#ifdef _OPENMP
    m.attr("OPENMP") = true;
#else
    m.attr("OPENMP") = false;
#endif

    m.def("isa", [] { return chosen_tile().name; }, "Name the instruction set in use.");
    m.def(
        "available_isas",
        [] {
            std::vector<std::string> names;
            for (const Tile* tile : available_tiles()) names.emplace_back(tile->name);
            return names;
        },
        "List the instruction sets of this processor that there are kernels for, worst first.");
    m.def(
        "cosine_max",
        [](uintptr_t features, int64_t n, int64_t features_stride, uintptr_t prototypes, int64_t k,
           int64_t prototypes_stride, int64_t d, int element, uintptr_t similarity, uintptr_t index,
           int threads) {
            const Tile& tile = chosen_tile();
            const Element type = static_cast<Element>(element);
            const Rows left{reinterpret_cast<const void*>(features), n, features_stride, d, type};
            const Rows right{reinterpret_cast<const void*>(prototypes), k, prototypes_stride, d, type};
            py::gil_scoped_release release;
            cosine_max(tile, left, right, reinterpret_cast<float*>(similarity),
                       reinterpret_cast<int64_t*>(index), threads);
        },
        "Fill similarity (N,) float32 and index (N,) int64; rows may be strided, channels must be "
        "contiguous.");
    m.def(
        "dpm_stats",
        [](uintptr_t x, int64_t n, int64_t stride, int64_t d, int element, uintptr_t means,
           uintptr_t precisions, uintptr_t constants, int64_t k, bool full, uintptr_t log_likelihood,
           uintptr_t count, uintptr_t first, uintptr_t second, int threads) {
            const Tile& tile = chosen_tile();
            const Rows rows{reinterpret_cast<const void*>(x), n, stride, d, static_cast<Element>(element)};
            const Mixture mixture{k,
                                  d,
                                  full,
                                  reinterpret_cast<const float*>(means),
                                  reinterpret_cast<const float*>(precisions),
                                  reinterpret_cast<const double*>(constants)};
            const MixtureSums out{reinterpret_cast<float*>(log_likelihood), reinterpret_cast<float*>(count),
                                  reinterpret_cast<float*>(first), reinterpret_cast<float*>(second)};
            py::gil_scoped_release release;
            int64_t evaluated = 0;
            const int64_t failed = dpm_stats(tile, mixture, rows, out, &evaluated, threads);
            return std::pair(failed, evaluated);
        },
        "Fill log_likelihood (N,), count (K,), first (K, D) and second, float32; give the first component "
        "that "
        "is not positive definite, or -1, and the pairs of row and component that were evaluated.");
}
