// Outlines of queries, and the sieve of both levels over a bank's columns.
#pragma once

#include <algorithm>

#include "query_codes.h"

namespace dinofast {

class QueryOutlines {
    static constexpr int ROWS = Int8Tile::ROWS;

  public:
    QueryOutlines(const Int8Tile& int8, int64_t tiles, const PackedBank& bank)
        : int8_(int8),
          bank_(bank),
          level_{{int8, tiles, bank.outline.channels(0)}, {int8, tiles, bank.outline.channels(1)}},
          tail_{allocate<float>(tiles * ROWS), allocate<float>(tiles * ROWS)},
          error_{allocate<float>(tiles * ROWS), allocate<float>(tiles * ROWS)} {}

    // What a query's part of the score may err.
    float error(int64_t i) const { return error_[1][i]; }

    void clear(int64_t tile) {
        for (int level = 0; level < 2; ++level) {
            level_[level].clear(tile);
            std::fill_n(tail_[level].get() + tile * ROWS, ROWS, 0.0f);
        }
    }

    // Put a query of squared norm `sq_norm` with coordinates (H,) into place i. `origin`: H zeros; the buffer
    // holds 2 * (H + 4) floats.
    void fill(int64_t i, const float* drawn, double sq_norm, const float* origin, float* buffer) {
        const Outline& outline = bank_.outline;
        const int64_t d = bank_.rows.rows.d;
        float error = outline.slack(d, sq_norm);
        double inside = 0;
        for (int level = 0; level < 2; ++level) {
            const float* const part = drawn + outline.first(level);
            level_[level].fill(i, part, origin, outline.weight[level], 0, buffer);
            error_[level][i] = error = error + level_[level].error(i);
            for (int64_t j = 0; j < outline.channels(level); ++j) {
                inside += static_cast<double>(part[j]) * part[j];
            }
            tail_[level][i] = outline.rest(d, sq_norm, inside);
        }
    }

    int64_t codes_of_tile() const { return level_[0].codes_of_tile() + level_[1].codes_of_tile(); }

    // Up to ROWS queries for the sieve: those of one tile, in order, or any, collected in memory of
    // codes_of_tile().
    class Tile {
      public:
        Tile(const QueryOutlines& from, int64_t tile) : from_(from) {
            for (int i = 0; i < 2; ++i) {
                const QueryCodes& codes = from.level_[i];
                rows_[i] = {codes.codes(tile), codes.scale(tile), codes.sum(tile),
                            from.tail_[i].get() + tile * ROWS, threshold_[i]};
            }
        }
        Tile(const QueryOutlines& from, const int64_t* queries, int64_t n, int32_t* codes) : from_(from) {
            for (int i = 0; i < 2; ++i) {
                collected_[i].codes = codes + (i == 0 ? 0 : from.level_[0].codes_of_tile());
                from.level_[i].gather(queries, n, collected_[i]);
                for (int64_t r = 0; r < ROWS; ++r) tails_[i][r] = r < n ? from.tail_[i][queries[r]] : 0;
                rows_[i] = {collected_[i].codes, collected_[i].scale, collected_[i].sum, tails_[i],
                            threshold_[i]};
            }
        }
        Tile(const Tile&) = delete;
        Tile& operator=(const Tile&) = delete;

        // Int8Tile::sift over columns `first` to first + columns; limits[r] is the least score of row r, a
        // query or, where that is -1, none.
        int64_t sift(const int64_t* queries, int64_t first, int64_t columns, const float* limits, Hit* hits) {
            const Outline& outline = from_.bank_.outline;
            CodedColumns of_bank[2];
            for (int i = 0; i < 2; ++i) {
                for (int64_t r = 0; r < ROWS; ++r) {
                    const int64_t q = queries[r];
                    threshold_[i][r] = q < 0 ? INFINITY : limits[r] - from_.error_[i][q];
                }
                const Outline::Level level = outline.level(i, from_.bank_.columns);
                const int64_t depth = quads(outline.channels(i));
                of_bank[i] = {level.codes + first * depth * 4, depth, level.scale + first, level.tail + first,
                              level.bias + first};
            }
            return from_.int8_.sift(rows_, of_bank, columns, hits);
        }

      private:
        const QueryOutlines& from_;
        CodedRows rows_[2];
        float threshold_[2][ROWS];
        QueryTile collected_[2];
        float tails_[2][ROWS];
    };

  private:
    const Int8Tile& int8_;
    const PackedBank& bank_;
    QueryCodes level_[2];
    Array<float> tail_[2], error_[2];
};

}  // namespace dinofast
