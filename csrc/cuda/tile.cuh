// The one primitive for a thread block: products of 64 rows with 64 columns, 4 x 4 in each of 256 threads.
#pragma once

#include "rows.cuh"

namespace dinofast {

constexpr int BLOCK_ROWS = 64, BLOCK_COLUMNS = 64, BLOCK_DEPTH = 16, BLOCK_THREADS = 256, EACH = 4;
constexpr int BLOCK_CHUNK = 512;  // channels summed into one accumulator: fewer rounding errors in long rows

struct alignas(16) Panel {                  // read four floats at a time
    float at[BLOCK_DEPTH][BLOCK_ROWS + 4];  // + 4: fewer bank conflicts, float4 stays aligned
};

// Bring channels [depth, depth + BLOCK_DEPTH) of 64 rows from `first` on into shared memory; what is absent
// is zero.
template <class T>
__device__ void load_panel(Panel& panel, const T* rows, const Scale* scales, int64_t first, int64_t count,
                           int64_t stride, int64_t depth, int64_t d) {
    const int local = threadIdx.x / 4, start = threadIdx.x % 4 * 4;
    const int64_t row = first + local;
    const float scale = row < count ? scales[row].first : 0;
    for (int i = 0; i < 4; ++i) {
        const int64_t k = depth + start + i;
        panel.at[start + i][local] = row < count && k < d ? to_float(rows[row * stride + k]) * scale : 0;
    }
}

// product[i][j]: row threadIdx.x / 16 * 4 + i times column threadIdx.x % 16 * 4 + j of the block, both
// brought to their power of two but not yet to unit norm. The order in which channels are
// summed does not depend on where row and column stand.
template <class T>
__device__ void block_products(float (&product)[EACH][EACH], Panel& left, Panel& right, const T* rows,
                               const Scale* row_scales, int64_t first_row, int64_t n, int64_t row_stride,
                               const T* columns, const Scale* column_scales, int64_t first_column, int64_t k,
                               int64_t column_stride, int64_t d) {
    const int row = threadIdx.x / 16 * EACH, column = threadIdx.x % 16 * EACH;
    float sum[EACH][EACH] = {};
    for (int i = 0; i < EACH; ++i) {
        for (int j = 0; j < EACH; ++j) product[i][j] = 0;
    }
    for (int64_t depth = 0; depth < d; depth += BLOCK_DEPTH) {
        __syncthreads();  // the previous panels have been read
        load_panel(left, rows, row_scales, first_row, n, row_stride, depth, d);
        load_panel(right, columns, column_scales, first_column, k, column_stride, depth, d);
        __syncthreads();
#pragma unroll
        for (int step = 0; step < BLOCK_DEPTH; ++step) {
            const float4 a4 = *reinterpret_cast<const float4*>(&left.at[step][row]);
            const float4 b4 = *reinterpret_cast<const float4*>(&right.at[step][column]);
            const float a[EACH] = {a4.x, a4.y, a4.z, a4.w}, b[EACH] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
#pragma unroll
                for (int j = 0; j < EACH; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
            }
        }
        if ((depth + BLOCK_DEPTH) % BLOCK_CHUNK != 0 && depth + BLOCK_DEPTH < d) continue;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                product[i][j] += sum[i][j];
                sum[i][j] = 0;
            }
        }
    }
}

}  // namespace dinofast
