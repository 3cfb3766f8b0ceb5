#include "../int8_tile.h"

namespace dinofast {
namespace {

int64_t sieve(const int32_t* tile, const float* row_scale, const int32_t* row_sum, const uint8_t* panels,
              int64_t columns, int64_t quads, const float* scale, const float* bias, const float* threshold,
              Hit* hits) {
    constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS, QUADS = Int8Tile::RUN / 4;
    int64_t found = 0;
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        for (int r = 0; r < ROWS; ++r) {
            int32_t sum[COLUMNS];
            for (int c = 0; c < COLUMNS; ++c) sum[c] = -128 * row_sum[r];
            for (int64_t quad = 0; quad < quads; ++quad) {
                const int64_t run = quad / QUADS, at = (run * ROWS + r) * QUADS + quad % QUADS;
                const int8_t* a = reinterpret_cast<const int8_t*>(tile + at);
                const uint8_t* b = panels + (column * quads + quad * COLUMNS) * 4;
                for (int c = 0; c < COLUMNS; ++c) {
                    sum[c] +=
                        a[0] * b[4 * c] + a[1] * b[4 * c + 1] + a[2] * b[4 * c + 2] + a[3] * b[4 * c + 3];
                }
            }
            for (int c = 0; c < COLUMNS && column + c < columns; ++c) {
                const float score =
                    row_scale[r] * (scale[column + c] * static_cast<float>(sum[c])) + bias[column + c];
                if (!(score < threshold[r])) hits[found++] = {r, static_cast<int32_t>(column + c), score};
            }
        }
    }
    return found;
}

// The product of a row of the tile with a column, scaled.
float product(const CodedRows& rows, int r, const CodedColumns& columns, int64_t column) {
    constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS, QUADS = Int8Tile::RUN / 4;
    const uint8_t* b = columns.panels + (column / COLUMNS * columns.quads * COLUMNS + column % COLUMNS) * 4;
    int32_t sum = -128 * rows.sum[r];
    for (int64_t quad = 0; quad < columns.quads; ++quad, b += 4 * COLUMNS) {
        const int64_t at = (quad / QUADS * ROWS + r) * QUADS + quad % QUADS;
        const int8_t* a = reinterpret_cast<const int8_t*>(rows.tile + at);
        sum += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
    }
    return rows.scale[r] * (columns.scale[column] * static_cast<float>(sum));
}

int64_t sift(const CodedRows rows[2], const CodedColumns columns[2], int64_t count, Hit* hits) {
    int64_t found = 0;
    for (int64_t first = 0; first < count; first += Int8Tile::COLUMNS) {
        for (int r = 0; r < Int8Tile::ROWS; ++r) {
            for (int64_t c = first; c < first + Int8Tile::COLUMNS && c < count; ++c) {
                float score = 0, sum = 0;
                int level = 0;
                for (; level < 2; ++level) {
                    const CodedColumns& y = columns[level];
                    sum += product(rows[level], r, y, c);
                    score = rows[level].tail[r] * y.tail[c] + (sum + y.bias[c]);
                    if (score < rows[level].threshold[r]) break;
                }
                if (level == 2) hits[found++] = {r, static_cast<int32_t>(c), score};
            }
        }
    }
    return found;
}

}  // namespace

const Int8Tile baseline_int8_tile = {"baseline", sieve, sift, nullptr, nullptr, nullptr};

}  // namespace dinofast
