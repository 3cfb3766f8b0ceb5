#include "cosine_max.h"

#include <algorithm>

#include "nearest.h"

namespace dinofast {

void cosine_max(const Tile& tile, const Int8Tile& int8, const Rows& features, const Rows& prototypes,
                float* similarity, int64_t* index, int threads) {
    Nearest(tile, int8, Value::cosine, features, prototypes, threads).run(similarity, index);
    std::replace(index, index + features.count, int64_t{-1}, int64_t{0});
}

}  // namespace dinofast
