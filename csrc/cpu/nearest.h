// For every row the best of some columns. A screen scores all pairs within a proven error, in int8 where the
// processor multiplies it faster, else in float32; what may be best is decided by one float32 value of the
// pair, the same for every screen. So the results depend neither on the screen nor on the number of threads.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "int8_tile.h"
#include "memory.h"
#include "rows.h"

namespace dinofast {

enum class Value {
    cosine,      // higher is better
    sq_distance  // lower is better; columns are float32
};

class Nearest {
  public:
    Nearest(const Tile& tile, const Int8Tile& int8, Value what, const Rows& rows, const Rows& columns,
           int threads);

    // Fill value (N,) and index (N,): of equal values the smallest index. A row with NaN or inf gets NaN and
    // index -1; when a column has one, all rows do. `then`, if any, is called by every thread once the rows
    // from first to last are decided, part after part; not when a column is broken.
    void run(float* value, int64_t* index, const std::function<void(int64_t first, int64_t last)>& then = {});

  private:
    // One thread's tiles of rows and what it knows of each row.
    struct Scratch {
        Array<float> rows, tiles, buffer, scores, scale, norm, rest, offset;
        Array<int8_t> codes, code_buffer;
        Array<const float*> x;
        Array<int32_t> sum, columns;
        Array<bool> open;
    };

    Scratch scratch() const;
    void find_center();
    void prepare_panel(int64_t c, Scratch& mine);
    bool prepare_column(int64_t c, Scratch& mine);
    void pack_floats(int64_t c, float* buffer);
    void decide(int64_t begin, int64_t end, Scratch& mine, float* value, int64_t* index);
    void prepare_tile(int64_t t, int64_t slot, bool int8, Scratch& mine, float* value, int64_t* index);
    void prepare_row(int64_t i, int64_t slot, int64_t r, bool int8, Scratch& mine, float* value,
                     int64_t* index);
    int64_t decide_tile(int64_t t, int64_t slot, int64_t c, int64_t count, bool int8, Scratch& mine,
                        float* value, int64_t* index) const;
    const float* column(int64_t c) const;
    float limit_for(float value, float norm, float offset) const;

    const Tile& tile_;
    const Int8Tile& int8_;
    const Value what_;
    const Rows rows_, columns_;
    const int64_t d_, padded_, height_, quads_, code_size_;  // of a row: floats, and bytes of codes, padded
    const int64_t block_, group_, slots_;  // columns prepared, and scanned, at a time; tiles a thread holds
    const float gamma_;
    const int threads_;
    std::atomic<bool> int8_pays_, broken_{false}, floats_{false};
    int64_t start_ = 0, count_ = 0;  // the columns that are prepared

    Array<float> zero_, center_;
    float center_square_ = 0;
    Array<float> units_, panels_, plain_bias_;                // of the prepared columns
    Array<float> column_scale_, bias_, column_rest_, column_norm_, own_;
    Array<float> panel_rest_, panel_norm_, panel_own_;  // the most of each panel
    Array<uint8_t> column_codes_;
};

}  // namespace dinofast
