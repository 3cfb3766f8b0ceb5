// The only file of _native that knows Python. Pointers come as integers; callers have checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cosine_max.h"
#include "cpu/isa.h"
#include "cpu/knn_topk.h"

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
    m.attr("MAX_K") = static_cast<int>(Candidates::MAX_K);
    m.def(
        "knn_topk",
        [](uintptr_t queries, int64_t q, int64_t queries_stride, uintptr_t bank, int64_t m,
           int64_t bank_stride, int64_t d, int element, bool prepared, int k, int metric, uintptr_t distance,
           uintptr_t index, int threads) {
            const Tile& tile = chosen_tile();
            const Element type = static_cast<Element>(element);
            const Rows left{reinterpret_cast<const void*>(queries), q, queries_stride, d, type};
            const Rows right{reinterpret_cast<const void*>(bank), m, bank_stride, d, type};
            py::gil_scoped_release release;
            knn_topk(tile, left, {right, prepared}, k, static_cast<Metric>(metric),
                     reinterpret_cast<float*>(distance), reinterpret_cast<int64_t*>(index), threads);
        },
        "Fill distance (Q, k) float32 and index (Q, k) int64; k <= MAX_K. `prepared` tells that the bank's "
        "rows "
        "are what unit_rows gives.");
}
