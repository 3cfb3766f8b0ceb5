#pragma once

#include "rows.h"

namespace dinofast {

constexpr int64_t FEW_COSINES = 16;  // columns up to which plain products are faster than any screen

// For every row the best cosine and its column, the smallest index of equal ones, of at most FEW_COSINES
// columns: one pass over the rows, which are scaled after the product. A zero row gets 0 and index 0; a row
// with NaN or inf, and every row when a column has one, NaN and index 0.
void few_cosines(const Tile& tile, const Rows& rows, const Rows& columns, float* value, int64_t* index,
                 int threads);

}  // namespace dinofast
