#include <algorithm>
#include <stdexcept>
#include <string>

#include "cosine_max.h"
#include "tile.cuh"

namespace dinofast {
namespace {

using Key = unsigned long long;

// A number whose order is: NaN above all, then by similarity, then by smaller column. The largest key of a
// row is therefore its result, in whatever order blocks finish.
__host__ __device__ inline Key make_key(float similarity, uint32_t column) {
    union {
        float value;
        uint32_t bits;
    } x;
    x.value = similarity + 0.0f;  // -0 becomes 0: equal similarities get equal bits
    const uint32_t ordered = similarity != similarity ? 0xffffffffu
                             : x.bits >> 31           ? ~x.bits
                                                      : x.bits | 0x80000000u;
    return static_cast<Key>(ordered) << 32 | (0xffffffffu - column);
}

__host__ __device__ inline float key_similarity(Key key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    if (ordered == 0xffffffffu) return NAN;
    union {
        uint32_t bits;
        float value;
    } x;
    x.bits = ordered >> 31 ? ordered & 0x7fffffffu : ~ordered;
    return fminf(fmaxf(x.value, -1.0f), 1.0f);
}

__host__ __device__ inline int64_t key_column(Key key) {
    return 0xffffffffu - static_cast<uint32_t>(key & 0xffffffffu);
}

__global__ void clear(Key* keys, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) keys[i] = 0;
}

// A block compares 64 rows with `share` columns, a multiple of 64.
template <class T>
__global__ void __launch_bounds__(BLOCK_THREADS)
    best_columns(const T* rows, const Scale* row_scales, int64_t n, int64_t row_stride, const T* columns,
                 const Scale* column_scales, int64_t k, int64_t column_stride, int64_t d, int64_t share,
                 Key* keys) {
    __shared__ Panel left, right;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * BLOCK_ROWS;
    const int64_t row = first_row + threadIdx.x / 16 * EACH;
    const int64_t begin = blockIdx.y * share, end = begin + share < k ? begin + share : k;
    float unit[EACH];
    Key best[EACH];
    for (int i = 0; i < EACH; ++i) {
        unit[i] = row + i < n ? row_scales[row + i].second : 0;
        best[i] = 0;
    }
    for (int64_t first = begin; first < end; first += BLOCK_COLUMNS) {
        float product[EACH][EACH];
        block_products(product, left, right, rows, row_scales, first_row, n, row_stride, columns,
                       column_scales, first, k, column_stride, d);
        const int64_t column = first + threadIdx.x % 16 * EACH;
        for (int j = 0; j < EACH; ++j) {
            if (column + j >= end) break;
            const float column_unit = column_scales[column + j].second;
            for (int i = 0; i < EACH; ++i) {
                const Key key =
                    make_key(product[i][j] * unit[i] * column_unit, static_cast<uint32_t>(column + j));
                best[i] = key > best[i] ? key : best[i];
            }
        }
    }
    for (int i = 0; i < EACH; ++i) {
        for (int step = 8; step > 0; step /= 2) {
            const Key other = __shfl_xor_sync(0xffffffff, best[i], step);
            best[i] = other > best[i] ? other : best[i];
        }
        if (threadIdx.x % 16 == 0 && row + i < n) atomicMax(keys + row + i, best[i]);
    }
}

__global__ void finish(const Key* keys, int64_t n, float* similarity, int64_t* index) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    similarity[i] = key_similarity(keys[i]);
    index[i] = key_column(keys[i]);
}

int64_t blocks(int64_t work, int64_t each) { return (work + each - 1) / each; }

// Launch and look at this launch's own error only.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t x, int64_t y, cudaStream_t stream,
            Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
    config.blockDim = dim3(BLOCK_THREADS);
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("cosine_max: ") + cudaGetErrorString(error));
}

template <class T>
void run(DeviceRows features, DeviceRows prototypes, int64_t d, float* similarity, int64_t* index, Key* keys,
         Scale* scales, cudaStream_t stream) {
    const int64_t n = features.count, k = prototypes.count;
    const T* rows = static_cast<const T*>(features.data);
    const T* columns = static_cast<const T*>(prototypes.data);
    Scale* column_scales = scales + n;
    int64_t share = 512;  // columns a block; fewer when that leaves multiprocessors idle
    while (share > BLOCK_COLUMNS && blocks(n, BLOCK_ROWS) * blocks(k, share) < 512) share /= 2;
    share = std::max(share, blocks(k, int64_t{65535} * BLOCK_COLUMNS) * BLOCK_COLUMNS);  // gridDim.y < 65536
    launch(clear, blocks(n, BLOCK_THREADS), 1, stream, keys, n);
    launch(row_scales<T>, blocks(n, BLOCK_THREADS / 32), 1, stream, rows, n, features.stride, d, scales);
    launch(row_scales<T>, blocks(k, BLOCK_THREADS / 32), 1, stream, columns, k, prototypes.stride, d,
           column_scales);
    launch(best_columns<T>, blocks(n, BLOCK_ROWS), blocks(k, share), stream, rows, scales, n, features.stride,
           columns, column_scales, k, prototypes.stride, d, share, keys);
    launch(finish, blocks(n, BLOCK_THREADS), 1, stream, keys, n, similarity, index);
}

}  // namespace

void cosine_max(DeviceRows features, DeviceRows prototypes, int64_t d, Element element, float* similarity,
                int64_t* index, uint64_t* keys, float* scales, int device, void* stream) {
    if (features.count == 0) return;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("cosine_max: ") + cudaGetErrorString(error));
    const auto call = element == Element::float32    ? run<float>
                      : element == Element::bfloat16 ? run<__nv_bfloat16>
                                                     : run<__half>;
    call(features, prototypes, d, similarity, index, reinterpret_cast<Key*>(keys),
         reinterpret_cast<Scale*>(scales), static_cast<cudaStream_t>(stream));
}

}  // namespace dinofast
