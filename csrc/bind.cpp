// The only file of _native that knows Python. Pointers come as integers; callers have checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cosine_map.h"
#include "cpu/cosine_max.h"
#include "cpu/dpm_stats.h"
#include "cpu/farthest_point.h"
#include "cpu/isa.h"
#include "cpu/k_center.h"
#include "cpu/kmeans_step.h"
#include "cpu/knn_topk.h"
#include "cpu/knn_topk_bank.h"

namespace py = pybind11;
using namespace dinofast;

namespace {

// The tensors of a packed bank, in the order of CODED and the rest of GROUPED in
// dinofast/ops/knn_topk_bank.py; null pointers and 0 groups where there are none. `depth` is that of the
// outlines.
PackedBank packed_bank(const std::vector<uintptr_t>& at, int64_t m, int64_t columns, int64_t groups,
                       int64_t depth, int64_t d) {
    return {{{reinterpret_cast<const void*>(at[0]), m, d, d, Element::float32}, true},
            reinterpret_cast<const float*>(at[1]),
            columns,
            reinterpret_cast<float*>(at[2]),
            reinterpret_cast<uint8_t*>(at[3]),
            reinterpret_cast<float*>(at[4]),
            reinterpret_cast<float*>(at[5]),
            reinterpret_cast<float*>(at[6]),
            groups,
            reinterpret_cast<const int64_t*>(at[7]),
            reinterpret_cast<const int64_t*>(at[8]),
            reinterpret_cast<const float*>(at[9]),
            reinterpret_cast<const float*>(at[10]),
            {depth, reinterpret_cast<const float*>(at[11]), reinterpret_cast<float*>(at[12]),
             reinterpret_cast<uint8_t*>(at[13]), reinterpret_cast<float*>(at[14]),
             reinterpret_cast<float*>(at[15]), reinterpret_cast<float*>(at[16])}};
}

// (count, pointers of start, index and weight)
using WeightsArgument = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t>;

Weights weights(const WeightsArgument& x) {
    return {std::get<0>(x), reinterpret_cast<const int32_t*>(std::get<1>(x)),
            reinterpret_cast<const int32_t*>(std::get<2>(x)), reinterpret_cast<const float*>(std::get<3>(x))};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.attr("FLOAT32") = static_cast<int>(Element::float32);
    m.attr("BFLOAT16") = static_cast<int>(Element::bfloat16);
    m.attr("FLOAT16") = static_cast<int>(Element::float16);
#ifdef _OPENMP
    m.attr("OPENMP") = true;
#else
    m.attr("OPENMP") = false;
#endif

    m.def("isa", [] { return chosen_isa().name; }, "Name the instruction set in use.");
    m.def(
        "available_isas",
        [] {
            std::vector<std::string> names;
            for (const Isa& isa : available_isas()) names.emplace_back(isa.name);
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
            const Int8Tile& int8 = chosen_int8_tile();
            py::gil_scoped_release release;
            cosine_max(tile, int8, left, right, reinterpret_cast<float*>(similarity),
                       reinterpret_cast<int64_t*>(index), threads);
        },
        "Fill similarity (N,) float32 and index (N,) int64. "
        "Rows may be strided, the channels of a row are contiguous.");
    m.attr("MAX_K") = static_cast<int>(Candidates::MAX_K);
    m.def(
        "knn_topk",
        [](uintptr_t queries, int64_t q, int64_t queries_stride, uintptr_t bank, int64_t m,
           int64_t bank_stride, int64_t d, int element, bool prepared, int k, int metric, uintptr_t distance,
           uintptr_t index, int threads) {
            const Isa& isa = chosen_isa();
            const Element type = static_cast<Element>(element);
            const Rows left{reinterpret_cast<const void*>(queries), q, queries_stride, d, type};
            const Rows right{reinterpret_cast<const void*>(bank), m, bank_stride, d, type};
            py::gil_scoped_release release;
            knn_topk(isa.tile, isa.int8, left, {right, prepared}, k, static_cast<Metric>(metric),
                     reinterpret_cast<float*>(distance), reinterpret_cast<int64_t*>(index), threads);
        },
        "Fill distance (Q, k) float32 and index (Q, k) int64; k <= MAX_K. "
        "`prepared` tells that the bank's rows are what unit_rows gives.");
    m.attr("INT8_COLUMNS") = static_cast<int>(Int8Tile::COLUMNS);
    m.attr("INT8_MAX_D") = static_cast<int64_t>(Int8Tile::MAX_D);
    m.def("int8_isa", [] { return chosen_int8_tile().name; }, "Name the instruction set of the int8 sieve.");
    m.def(
        "unit_rows",
        [](uintptr_t rows, int64_t m, int64_t stride, int64_t d, int element, uintptr_t out, int threads) {
            const Tile& tile = chosen_tile();
            const Rows from{reinterpret_cast<const void*>(rows), m, stride, d, static_cast<Element>(element)};
            py::gil_scoped_release release;
            return unit_rows(tile, from, reinterpret_cast<float*>(out), threads);
        },
        "Fill out (M, D) float32 with the rows scaled to unit norm; zero rows stay zero. "
        "Returns the number of the first row with NaN or inf, or -1.");
    m.def(
        "quantize_bank",
        [](const std::vector<uintptr_t>& packed, int64_t m, int64_t columns, int64_t groups, int64_t depth,
           int64_t d, int metric, int threads) {
            const Tile& tile = chosen_tile();
            py::gil_scoped_release release;
            quantize_bank(tile, packed_bank(packed, m, columns, groups, depth, d),
                          static_cast<Metric>(metric), threads);
        },
        "Fill weight, codes, scale, bias and error of a packed bank, or those of its outlines.");
    m.def(
        "knn_topk_bank",
        [](uintptr_t queries, int64_t q, int64_t queries_stride, int64_t d, int element,
           const std::vector<uintptr_t>& packed, int64_t m, int64_t columns, int64_t groups, int64_t depth,
           int k, int metric, int64_t probes, uintptr_t distance, uintptr_t index, uintptr_t visited,
           int threads) {
            const Tile& tile = chosen_tile();
            const Int8Tile& int8 = chosen_int8_tile();
            const Rows left{reinterpret_cast<const void*>(queries), q, queries_stride, d,
                            static_cast<Element>(element)};
            py::gil_scoped_release release;
            knn_topk_bank(tile, int8, left, packed_bank(packed, m, columns, groups, depth, d), k,
                          static_cast<Metric>(metric), probes, reinterpret_cast<float*>(distance),
                          reinterpret_cast<int64_t*>(index), reinterpret_cast<int64_t*>(visited), threads);
        },
        "Fill distance (Q, k) float32, index (Q, k) int64 and visited (Q, 3) int64 from a packed bank.");
    m.def(
        "upsample_blur",
        [](uintptr_t maps, int64_t batch, int64_t h, const WeightsArgument& rows,
           const WeightsArgument& columns, int64_t width, uintptr_t out, int threads) {
            const Lines& lines = chosen_tile().lines;
            py::gil_scoped_release release;
            upsample_blur(lines, reinterpret_cast<const float*>(maps), batch, weights(rows), weights(columns),
                          h, width, reinterpret_cast<float*>(out), threads);
        },
        "Fill out (B, H, W) float32 from maps (B, h, w) float32; columns are given transposed.");
    m.def(
        "cosine_map",
        [](uintptr_t features, int64_t n, int64_t features_stride, uintptr_t prototypes, int64_t k,
           int64_t prototypes_stride, int64_t d, int element, uintptr_t mask, int64_t h,
           const WeightsArgument& rows, const WeightsArgument& columns, int64_t width, uintptr_t out,
           int threads) {
            const Tile& tile = chosen_tile();
            const Element type = static_cast<Element>(element);
            const Rows left{reinterpret_cast<const void*>(features), n, features_stride, d, type};
            const Rows right{reinterpret_cast<const void*>(prototypes), k, prototypes_stride, d, type};
            const Int8Tile& int8 = chosen_int8_tile();
            py::gil_scoped_release release;
            cosine_map(tile, int8, left, right, reinterpret_cast<const bool*>(mask), weights(rows),
                       weights(columns), h, width, reinterpret_cast<float*>(out), threads);
        },
        "Fill out (B, H, W) float32 from the rows of B grids (h, w); mask (N,) bool or a null pointer.");
    m.def(
        "farthest_point",
        [](uintptr_t rows, int64_t n, int64_t stride, int64_t d, int element, uintptr_t min_distance,
           int64_t center, uintptr_t nearest, int threads) {
            const Tile& tile = chosen_tile();
            const Rows matrix{reinterpret_cast<const void*>(rows), n, stride, d,
                              static_cast<Element>(element)};
            py::gil_scoped_release release;
            return farthest_point(tile, matrix, reinterpret_cast<const float*>(min_distance), center,
                                  reinterpret_cast<float*>(nearest), threads);
        },
        "Fill nearest (N,) float32 and return the farthest row.");
    py::class_<KCenter>(m, "KCenter", "Greedy k-center selection; the rows must stay alive and unchanged.")
        .def(py::init([](uintptr_t rows, int64_t n, int64_t stride, int64_t d,
                         const std::vector<int64_t>& starts, bool mean, int64_t limit, int threads) {
            const Tile& tile = chosen_tile();
            const Rows matrix{reinterpret_cast<const void*>(rows), n, stride, d, Element::float32};
            py::gil_scoped_release release;
            return std::make_unique<KCenter>(tile, matrix, starts, mean, limit, threads);
        }))
        .def(
            "select",
            [](KCenter& self, int64_t count, uintptr_t index, int threads) {
                py::gil_scoped_release release;
                self.select(count, reinterpret_cast<int64_t*>(index), threads);
            },
            "Select count more rows into index (count,) int64.");
    m.def(
        "kmeans_step",
        [](uintptr_t rows, int64_t n, int64_t stride, int64_t d, int element, uintptr_t centers, int64_t k,
           int64_t centers_stride, uintptr_t index, uintptr_t sq_distance, uintptr_t sums, uintptr_t counts,
           int threads) {
            const Tile& tile = chosen_tile();
            const Int8Tile& int8 = chosen_int8_tile();
            const Rows left{reinterpret_cast<const void*>(rows), n, stride, d, static_cast<Element>(element)};
            const Rows right{reinterpret_cast<const void*>(centers), k, centers_stride, d, Element::float32};
            py::gil_scoped_release release;
            kmeans_step(tile, int8, left, right, reinterpret_cast<int64_t*>(index),
                        reinterpret_cast<float*>(sq_distance), reinterpret_cast<float*>(sums),
                        reinterpret_cast<int64_t*>(counts), threads);
        },
        "Fill index (N,) int64, sq_distance (N,) float32, sums (K, D) float32 and counts (K,) int64; centers "
        "are float32.");
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
            double expectation = 0;
            const int64_t failed = dpm_stats(tile, mixture, rows, out, &evaluated, &expectation, threads);
            return std::tuple(failed, evaluated, expectation);
        },
        "Fill log_likelihood (N,), count (K,), first (K, D) and second, float32. Returns the first component "
        "that is not positive definite, or -1, how many pairs of row and component were evaluated, and the "
        "seconds that the responsibilities took.");
}
