// For every row the best of some columns. A screen scores all pairs within a proven error, in int8 where the
// processor multiplies it faster, else in float32; what may be best is decided by one float32 value of the
// pair, the same for every screen. So the results depend neither on the screen nor on the number of threads.
// Of bitwise equal columns only the first is looked at. Where a screen holds nothing back, all pairs of a
// tile are decided at once.
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
    enum class Screen { int8, float32, none };

    // What the score of a row of a tile may err: by the column, and at most in the group.
    struct Error {
        float base, by_rest, by_norm, most;
    };

    // One thread's tiles of rows and what it knows of each row.
    struct Scratch {
        Array<float> rows, tiles, buffer, scores, scale, norm, rest, offset, factor;
        Array<uint8_t> codes;
        Array<int8_t> code_buffer;
        Array<const float*> x;  // times the factor it is what columns are compared with
        Array<Hit> pairs;       // row of the tile, column of the group
        Array<float> own;
        Array<bool> open;
    };

    Scratch scratch() const;
    void find_center();
    bool read_column(int64_t j, Scratch& mine);
    void keep_distinct();
    void prepare_panel(int64_t c, Scratch& mine);
    void prepare_column(int64_t c, Scratch& mine);
    void pack_floats(int64_t c, float* buffer);
    void decide(int64_t begin, int64_t end, Scratch& mine, float* value, int64_t* index);
    void prepare_tile(int64_t t, int64_t slot, Screen screen, Scratch& mine, float* value,
                      int64_t* index) const;
    const float* read_row(int64_t i, Screen screen, float* own, float* buffer) const;
    bool prepare_row(int64_t slot, int64_t r, const float* x, Screen screen, const Quantized& found,
                     Scratch& mine, float& value) const;
    int64_t decide_tile(int64_t t, int64_t slot, int64_t c, int64_t count, Screen screen, Scratch& mine,
                        float* value, int64_t* index) const;
    void decide_pairs(int64_t t, int64_t slot, int64_t c, int64_t count, Scratch& mine, float* value,
                      int64_t* index) const;
    void write_unit(int64_t at, Scratch& mine) const;
    void decide_all(int64_t t, int64_t slot, int64_t begin, int64_t rows, int64_t c, int64_t count,
                    Scratch& mine, float* value, int64_t* index) const;
    void judge(Screen screen, int64_t rows, int64_t found);
    void offer(float own, int64_t number, float& value, int64_t& index) const;
    const float* read(int64_t j) const;
    const float* column(int64_t c) const { return read(number_[c]); }
    // Places of a hash table for so many columns: a power of two, at least half of them free.
    static constexpr int64_t table_size(int64_t count) {
        int64_t size = 4;
        while (size < 2 * count) size *= 2;
        return size;
    }
    float limit_for(float value, float norm, float offset) const;

    static constexpr int64_t PANEL =
        Int8Tile::COLUMNS;                     // columns prepared at once: whole panels of every tile
    static constexpr float HUGE_NORM = 1e15f;  // scores of longer rows might overflow

    const Tile& tile_;
    const Int8Tile& int8_;
    const Value what_;
    const Rows rows_, columns_;
    const int64_t d_, padded_, height_, quads_, code_size_;  // of a row: floats, and bytes of codes, padded
    const int64_t block_, group_, slots_;  // columns prepared, and scanned, at a time; tiles a thread holds
    const float gamma_;
    const int threads_;
    std::atomic<Screen> screen_;
    std::atomic<int> losses_{0};
    std::atomic<bool> broken_{false}, floats_{false};
    int64_t start_ = 0, read_ = 0, count_ = 0;  // the columns that are read, and the distinct ones of them

    Array<float> zero_, center_;
    float center_square_ = 0;
    bool centered_ = true;
    Array<float> units_;                // of the columns that are read
    Array<uint64_t> hash_;              // of their bits
    Array<int32_t> held_;               // a table of them by hash
    Array<int32_t> number_;             // of the distinct columns among them, ascending
    Array<float> panels_, plain_bias_;  // of the distinct columns
    Array<float> column_scale_, bias_, column_rest_, column_norm_, own_;
    Array<float> panel_rest_, panel_norm_, panel_own_;  // the most of each panel
    Array<int8_t> column_codes_;
    Array<int32_t> column_sum_;  // of the codes
};

}  // namespace dinofast
