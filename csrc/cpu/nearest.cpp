#include "nearest.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blocking.h"
#include "candidates.h"
#include "packed_bank.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t GROUP = 512;     // columns scanned at once: their scores fit the L1
constexpr int64_t PART = 1 << 18;  // floats of rows decided before `then` takes them
constexpr int64_t FEW = 6;         // pairs in which one decision costs no more than a screen gains
constexpr int LOSSES = 2;          // in a row, after which a screen is left
constexpr int64_t LEAST_D = 32;    // channels below which int8 gains nothing

int64_t group_columns(int64_t d, int64_t panel) {
    return std::clamp(PRIVATE / d / panel * panel, panel, GROUP);
}

}  // namespace

Nearest::Nearest(const Tile& tile, const Int8Tile& int8, Value what, const Rows& rows, const Rows& columns,
                 int threads)
    : tile_(tile),
      int8_(int8),
      what_(what),
      rows_(rows),
      columns_(columns),
      d_(rows.d),
      padded_(padded_depth(rows.d)),
      height_(tile.rows),
      quads_(quads(rows.d)),
      code_size_(round_up(rows.d, Int8Tile::RUN)),
      block_(std::min(round_up(columns.count, PANEL), std::max(SHARED / rows.d / PANEL, int64_t{1}) * PANEL)),
      group_(std::min(block_, group_columns(rows.d, PANEL))),
      slots_(group_ < block_ ? TILES : 1),
      gamma_(product_error(rows.d)),
#ifdef _OPENMP
      threads_(rows.count * columns.count * rows.d <= SMALL ? 1 : threads),
#else
      threads_(1),
#endif
      screen_(int8.products != nullptr && tile.rows == Int8Tile::ROWS && d_ >= LEAST_D &&
                      d_ <= Int8Tile::MAX_D
                  ? Screen::int8
                  : Screen::float32),
      zero_(allocate<float>(padded_)),
      center_(allocate<float>(padded_)),
      hash_(allocate<uint64_t>(block_)),
      held_(allocate<int32_t>(table_size(block_))),
      number_(allocate<int32_t>(block_)),
      panels_(allocate<float>(block_ * d_)),
      plain_bias_(allocate<float>(block_)),
      column_scale_(allocate<float>(block_)),
      bias_(allocate<float>(block_)),
      column_rest_(allocate<float>(block_)),
      column_norm_(allocate<float>(block_)),
      own_(allocate<float>(block_)),
      panel_rest_(allocate<float>(block_ / PANEL)),
      panel_norm_(allocate<float>(block_ / PANEL)),
      panel_own_(allocate<float>(block_ / PANEL)),
      column_codes_(allocate<int8_t>(block_ * quads_ * 4)),
      column_sum_(allocate<int32_t>(block_)) {
    if (what == Value::cosine) units_ = allocate<float>(block_ * padded_);
    std::fill(zero_.get(), zero_.get() + padded_, 0.0f);
}

Nearest::Scratch Nearest::scratch() const {
    const int64_t rows = slots_ * height_;
    return {allocate<float>(rows * padded_),
            allocate<float>(rows * padded_),
            allocate<float>(PANEL * padded_),
            allocate<float>(height_ * group_),
            allocate<float>(rows),
            allocate<float>(rows),
            allocate<float>(rows),
            allocate<float>(rows),
            allocate<float>(rows),
            allocate<uint8_t>(rows * code_size_),
            allocate<int8_t>(code_size_),
            allocate<const float*>(rows),
            allocate<Hit>(height_ * group_),
            allocate<float>(height_ * group_),
            allocate<bool>(rows)};
}

void Nearest::run(float* value, int64_t* index, const std::function<void(int64_t, int64_t)>& then) {
    const int64_t n = rows_.count, k = columns_.count;
    const bool in_parts = then && k <= block_;
    const int64_t part = in_parts ? round_up(std::max(PART / d_, int64_t{1}), height_) : n;
    std::atomic<int64_t> next_panel{0}, next_tile{0};
    std::fill(value, value + n, what_ == Value::cosine ? -INFINITY : INFINITY);
    std::fill(index, index + n, 0);
    find_center();
    std::vector<Scratch> scratches;
    for (int i = 0; i < threads_; ++i) scratches.push_back(scratch());

#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
        Scratch& mine = scratches[static_cast<size_t>(thread_number())];
        for (int64_t first = 0; first < n && !broken_; first += part) {
            const int64_t last = std::min(first + part, n);
            const int64_t offset = first / height_, tiles = (last - first + height_ - 1) / height_;
            for (int64_t start = 0; start < k; start += block_) {
                if (first == 0 || k > block_) {
#pragma omp single
                    {
                        start_ = start;
                        read_ = std::min(block_, k - start);
                        floats_ = screen_ == Screen::float32;
                    }
                    for (int64_t c; (c = next_panel.fetch_add(PANEL)) < read_;) {
                        for (int64_t j = c; j < std::min(c + PANEL, read_); ++j) {
                            if (!read_column(j, mine)) broken_ = true;
                        }
                    }
#pragma omp barrier
                    if (broken_) break;  // no thread reads again before all have read this
#pragma omp single
                    {
                        keep_distinct();
                        next_panel = 0;
                    }
                    for (int64_t c; (c = next_panel.fetch_add(PANEL)) < count_;) prepare_panel(c, mine);
#pragma omp barrier
                }
                for (int64_t begin, end; take(next_tile, tiles, threads_, begin, end);) {
                    decide(offset + begin, offset + end, mine, value, index);
                }
                if (start + block_ >= k && last == n && !then) break;
#pragma omp barrier
#pragma omp single
                {
                    next_panel = 0;
                    next_tile = 0;
                }
            }
            if (then && !broken_) then(first, last);
        }
    }
    if (broken_) {
        std::fill(value, value + n, NAN);
        std::fill(index, index + n, -1);
    }
}

// The tiles from begin to end against the block.
void Nearest::decide(int64_t begin, int64_t end, Scratch& mine, float* value, int64_t* index) {
    for (int64_t first = begin; first < end; first += slots_) {
        const Screen screen = screen_;
        if (screen == Screen::float32 && !floats_) {
#pragma omp critical(dinofast_nearest)
            if (!floats_) {
                for (int64_t c = 0; c < count_; c += PANEL) pack_floats(c, mine.buffer.get());
                floats_ = true;
            }
        }
        const int64_t tiles = std::min(slots_, end - first);
        for (int64_t slot = 0; slot < tiles; ++slot) {
            prepare_tile(first + slot, slot, screen, mine, value, index);
        }
        int64_t found = 0;
        for (int64_t c = 0; c < count_; c += group_) {
            for (int64_t slot = 0; slot < tiles; ++slot) {
                found += decide_tile(first + slot, slot, c, std::min(group_, count_ - c), screen, mine, value,
                                     index);
            }
        }
        if (screen != Screen::none) judge(screen, tiles * height_, found);
    }
}

// Leave a screen that let too many pairs through, again and again.
void Nearest::judge(Screen screen, int64_t rows, int64_t found) {
    const int64_t wasted = found - rows, pairs = rows * count_;
    if (wasted * FEW <= pairs) {
        losses_ = 0;
    } else if (++losses_ >= LOSSES) {
        const bool hopeless = screen == Screen::float32 || wasted * 2 > pairs;
        screen_ = what_ == Value::cosine && hopeless ? Screen::none : Screen::float32;
        losses_ = 0;
    }
}

void Nearest::prepare_tile(int64_t t, int64_t slot, Screen screen, Scratch& mine, float* value,
                           int64_t* index) const {
    const int64_t begin = t * height_, first = slot * height_;
    const int64_t present = std::min(height_, rows_.count - begin);
    float* const own = mine.rows.get() + first * padded_;
    const bool cosine = what_ == Value::cosine;
    const float* x[MAX_ROWS];
    Quantized found[MAX_ROWS];
    for (int64_t r = 0; r < height_; ++r) {
        mine.open[first + r] = false;
        mine.scale[first + r] = 0;
        mine.offset[first + r] = 0;
        mine.factor[first + r] = 1;
        mine.x[first + r] = zero_.get();
        if (r < present)
            x[r] = read_row(begin + r, screen, own + r * padded_, mine.buffer.get() + r * padded_);
    }
    if (screen == Screen::int8) {
        int8_.quantize_rows(x, present, centered_ ? center_.get() : nullptr, d_, cosine ? own : nullptr,
                            padded_, mine.codes.get() + first * code_size_, height_ * Int8Tile::RUN, found);
    }
    for (int64_t r = 0; r < present; ++r) {
        if (prepare_row(slot, r, x[r], screen, found[r], mine, value[begin + r])) continue;
        value[begin + r] = NAN;
        index[begin + r] = -1;
    }
}

// Row i as float32, in its own place where it must stay: such rows are read to a multiple of 16.
const float* Nearest::read_row(int64_t i, Screen screen, float* own, float* buffer) const {
    if (what_ == Value::sq_distance) return rows_.get(i, own);
    if (screen != Screen::int8 || centered_) return rows_.get(i, buffer);
    const float* const x = rows_.get(i, own);
    if (d_ % 16 == 0) return x;
    if (x != own) std::copy(x, x + d_, own);
    std::fill(own + d_, own + padded_, 0.0f);
    return own;
}

// False when the row holds NaN or inf.
bool Nearest::prepare_row(int64_t slot, int64_t r, const float* x, Screen screen, const Quantized& found,
                          Scratch& mine, float& value) const {
    const int64_t at = slot * height_ + r;
    const bool int8 = screen == Screen::int8;
    if (int8 && !centered_) {
        if (!(found.norm < HUGE_NORM)) return false;
        if (found.factor == 0) {
            value = 0;
            return true;
        }
        mine.factor[at] = found.factor;
    } else if (what_ == Value::cosine) {
        float* const unit = mine.rows.get() + at * padded_;
        if (int8 ? !(found.norm < HUGE_NORM) : !tile_.normalize(x, d_, unit, DEPTH)) return false;
        std::fill(unit + d_, unit + padded_, 0.0f);
        x = unit;
        if (std::all_of(x, x + d_, [](float part) { return part == 0; })) {
            value = 0;
            return true;
        }
    }
    mine.x[at] = x;
    mine.open[at] = true;
    if (int8) {
        mine.scale[at] = found.scale;
        mine.norm[at] = found.norm;
        mine.rest[at] = found.rest;
        mine.offset[at] = (1 - center_square_ - found.norm * found.norm) / 2;
    } else {
        mine.norm[at] = 2;  // of a product of unit rows, and more
        mine.rest[at] = 0;
    }
    if (what_ == Value::sq_distance && mine.scale[at] == 0) {  // not measured, or only bounded
        const double square = tile_.lines.sq_distance(x, center_.get(), d_);
        mine.norm[at] = static_cast<float>((1 + gamma_) * std::sqrt(square));
    }
    if (what_ == Value::sq_distance && !(mine.norm[at] < HUGE_NORM)) {
        mine.norm[at] = INFINITY;
        if (!std::isfinite(tile_.lines.sq_distance(x, zero_.get(), d_))) {
            mine.open[at] = false;
            mine.x[at] = zero_.get();
            return false;
        }
    }
    if (screen != Screen::float32) return true;
    float* out = mine.tiles.get() + slot * height_ * padded_ + r * DEPTH;
    for (int64_t run = 0; run < d_; run += DEPTH, out += height_ * DEPTH) {
        const int64_t depth = std::min<int64_t>(DEPTH, d_ - run);
        if (what_ == Value::cosine) {
            std::copy(x + run, x + run + depth, out);
        } else {
            subtract(x + run, center_.get() + run, depth, out);
        }
    }
    return true;
}

}  // namespace dinofast
