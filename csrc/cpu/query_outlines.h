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
          near_(int8, tiles, bank.outline.channels(0)),
          all_(int8, tiles, bank.outline.channels(1)),
          tail_(allocate<float>(2 * tiles * ROWS)),
          error_(allocate<float>(2 * tiles * ROWS)) {}

    // What a query's part of the score may err.
    float error(int64_t i) const { return error_[2 * i + 1]; }

    void clear(int64_t tile) {
        near_.clear(tile);
        all_.clear(tile);
    }

    // Put a query of squared norm `sq_norm` with coordinates (H,) into place i. `origin`: H zeros; the buffer
    // holds 2 * (H + 4) floats.
    void fill(int64_t i, const float* drawn, double sq_norm, const float* origin, float* buffer) {
        const Outline& outline = bank_.outline;
        const int64_t d = bank_.rows.rows.d;
        near_.fill(i, drawn, origin, outline.weight[0], 0, buffer);
        all_.fill(i, drawn + outline.near(), origin, outline.weight[1], 0, buffer);
        error_[2 * i] = near_.error(i) + outline.slack(d, sq_norm);
        error_[2 * i + 1] = error_[2 * i] + all_.error(i);
        double inside = 0;
        for (int level = 0; level < 2; ++level) {
            const float* const part = drawn + outline.first(level);
            for (int64_t j = 0; j < outline.channels(level); ++j) {
                inside += static_cast<double>(part[j]) * part[j];
            }
            tail_[2 * i + level] = outline.rest(d, sq_norm, inside);
        }
    }

    int64_t codes_of_tile() const { return near_.codes_of_tile() + all_.codes_of_tile(); }

    // Queries of one tile, collected in memory of codes_of_tile().
    class Tile {
      public:
        Tile(const QueryOutlines& from, const int64_t* queries, int64_t n, int32_t* codes)
            : from_(from),
              queries_(queries),
              n_(n),
              level_{{codes, {}, {}}, {codes + from.near_.codes_of_tile(), {}, {}}} {
            from.near_.gather(queries, n, level_[0]);
            from.all_.gather(queries, n, level_[1]);
            for (int64_t r = 0; r < n; ++r) {
                for (int level = 0; level < 2; ++level) tail_[level][r] = from.tail_[2 * queries[r] + level];
            }
        }

        // Int8Tile::sift over columns `first` to first + columns; limits[r] is the least score of row r.
        int64_t sift(int64_t first, int64_t columns, const float* limits, Hit* hits) const {
            const Outline& outline = from_.bank_.outline;
            CodedRows rows[2];
            CodedColumns of_bank[2];
            float threshold[2][ROWS];
            for (int i = 0; i < 2; ++i) {
                for (int64_t r = 0; r < ROWS; ++r) {
                    threshold[i][r] = r < n_ ? limits[r] - from_.error_[2 * queries_[r] + i] : INFINITY;
                }
                const Outline::Level level = outline.level(i, from_.bank_.columns);
                const int64_t depth = quads(outline.channels(i));
                rows[i] = {level_[i].codes, level_[i].scale, level_[i].sum, tail_[i], threshold[i]};
                of_bank[i] = {level.codes + first * depth * 4, depth, level.scale + first, level.tail + first,
                              level.bias + first};
            }
            return from_.int8_.sift(rows, of_bank, columns, hits);
        }

      private:
        const QueryOutlines& from_;
        const int64_t* const queries_;
        const int64_t n_;
        QueryTile level_[2];
        float tail_[2][ROWS] = {};
    };

  private:
    const Int8Tile& int8_;
    const PackedBank& bank_;
    QueryCodes near_, all_;
    Array<float> tail_, error_;  // of both levels, query after query
};

}  // namespace dinofast
