#pragma once

#include <cstdint>

#include "../element.h"

namespace dinofast {

// A row-major matrix on the device; `stride` counts elements from row to row.
struct DeviceRows {
    const void* data;
    int64_t count;
    int64_t stride;
};

// As cosine_max of csrc/cpu, enqueued on `stream` of `device`. Workspace, all on the device: keys (N,) 8
// bytes each, scales (N + K, 2) float32. Throws std::runtime_error when a launch fails.
void cosine_max(DeviceRows features, DeviceRows prototypes, int64_t d, Element element, float* similarity,
                int64_t* index, uint64_t* keys, float* scales, int device, void* stream);

}  // namespace dinofast
