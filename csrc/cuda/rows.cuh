// Rows of float32, bfloat16 or float16, and what brings each to unit norm.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace dinofast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// x * first has its largest magnitude near 1, exactly scaled; first * second brings the row to unit norm.
// A zero row has second = 0, a row with NaN or inf second = NaN, so every product with it is 0 or NaN.
struct Scale {
    float first, second;
};

// The power of two that brings `peak` to [1, 2); 2^127 for subnormal numbers, 2^-126 at the upper end.
__host__ __device__ inline float power_of_two_for(float peak) {
    union {
        float value;
        uint32_t bits;
    } x;
    x.value = peak;
    const uint32_t exponent = x.bits >> 23 & 0xff;
    x.bits = (exponent >= 253 ? 1 : 254 - exponent) << 23;
    return x.value;
}

// One warp a row. `count` rows of `d` channels, `stride` elements apart.
template <class T>
__global__ void row_scales(const T* rows, int64_t count, int64_t stride, int64_t d, Scale* scales) {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (row >= count) return;  // a whole warp leaves together
    const T* x = rows + row * stride;
    float peak = 0;
    bool finite = true;
    for (int64_t k = lane; k < d; k += 32) {
        const float magnitude = fabsf(to_float(x[k]));
        finite = finite && magnitude < INFINITY;
        peak = fmaxf(peak, magnitude);
    }
    for (int step = 16; step > 0; step /= 2) {
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, step));
    }
    if (__any_sync(0xffffffff, !finite)) {
        if (lane == 0) scales[row] = {1, NAN};
        return;
    }
    const float first = power_of_two_for(peak);
    float sum = 0;
    for (int64_t k = lane; k < d; k += 32) {
        const float scaled = to_float(x[k]) * first;
        sum = fmaf(scaled, scaled, sum);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) scales[row] = {first, sum == 0 ? 0.0f : 1 / sqrtf(sum)};
}

}  // namespace dinofast
