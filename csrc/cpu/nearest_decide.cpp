// How Nearest decides a tile: the screen's scores, the pairs that they leave, the values of those.
#include <algorithm>
#include <cmath>

#include "candidates.h"
#include "nearest.h"

namespace dinofast {
namespace {

constexpr int64_t DECIDED = 16;  // pairs decided at a time

}  // namespace

// Tile t, in its slot, against columns c to c + count of the block. How many pairs were decided.
int64_t Nearest::decide_tile(int64_t t, int64_t slot, int64_t c, int64_t count, Screen screen, Scratch& mine,
                             float* value, int64_t* index) const {
    const int64_t first = slot * height_;
    const bool int8 = screen == Screen::int8;
    if (screen == Screen::none) {
        decide_all(t, slot, 0, height_, c, count, mine.columns.get(), mine, value, index);
        return 0;
    }
    const int64_t next = std::min((t + slots_) * height_, rows_.count);
    const int64_t rows_ahead = c + count < count_ ? 0 : std::min(height_, rows_.count - next);
    const int64_t lines = rows_.bytes(rows_ahead) / 64;
    if (int8) {
        int8_.products(reinterpret_cast<const int32_t*>(mine.codes.get() + first * code_size_),
                       mine.scale.get() + first, mine.sum.get() + first, column_codes_.get() + c * quads_ * 4,
                       count, quads_, column_scale_.get() + c, bias_.get() + c, mine.scores.get(), group_,
                       rows_.at(next), lines);
    } else {
        tile_.products(mine.tiles.get() + first * padded_, panels_.get() + c * d_, count, d_,
                       plain_bias_.get() + c, mine.scores.get(), group_, rows_.at(next), lines);
    }
    float most_rest = 0, most_norm = 0, most_own = 0;
    for (int64_t p = c / PANEL; p * PANEL < c + count; ++p) {
        most_rest = std::max(most_rest, panel_rest_[p]);
        most_norm = std::max(most_norm, panel_norm_[p]);
        most_own = std::max(most_own, panel_own_[p]);
    }
    // Each step for all rows: what one row has to wait for does not keep the others.
    Wanted wanted[MAX_ROWS];
    int32_t* const lists = mine.columns.get();
    int64_t decided = 0, listed = 0, pairs = 0;
    for (int64_t r = 0; r < height_; ++r) {
        const int64_t at = first + r, i = t * height_ + r;
        Wanted& row = wanted[r];
        row.count = 0;
        if (!mine.open[at]) continue;
        const float norm = mine.norm[at];
        row.base = what_ == Value::cosine ? TINY : gamma_ * norm * norm + TINY;
        row.by_rest = int8 ? norm + mine.rest[at] : 0;
        row.by_norm = int8 ? mine.rest[at] : gamma_ * norm;
        row.limit = limit_for(value[i], norm, mine.offset[at]);
        const float slack = row.base + row.by_rest * most_rest + row.by_norm * most_norm + most_own;
        const int64_t found = tile_.lines.select(mine.scores.get() + r * group_, count, row.limit, slack,
                                                 lists + listed, &row.top);
        if (found == 0) continue;
        if (what_ == Value::cosine && found > 4 && found * 3 > count) {
            decide_all(t, slot, r, 1, c, count, lists + listed, mine, value, index);
            decided += found;
            continue;
        }
        row.count = found;
        listed += found;
        mine.pairs[pairs++] = {static_cast<int32_t>(r), row.top};
    }
    decide_pairs(t, slot, c, pairs, mine, value, index);
    decided += pairs;
    pairs = 0;
    const int32_t* list = lists;
    for (int64_t r = 0; r < height_; list += wanted[r++].count) {
        const Wanted& row = wanted[r];
        if (row.count < 2) continue;
        const int64_t at = first + r;
        const float* const score = mine.scores.get() + r * group_;
        const float own = limit_for(value[t * height_ + r], mine.norm[at], mine.offset[at]);
        const float limit = std::max(row.limit, own);
        for (int64_t f = 0; f < row.count; ++f) {
            const int64_t j = list[f];
            const float error = row.base + row.by_rest * column_rest_[c + j] +
                                row.by_norm * column_norm_[c + j] + own_[c + j];
            mine.pairs[pairs] = {static_cast<int32_t>(r), list[f]};
            pairs += (list[f] != row.top) & !(score[j] + error < limit);
        }
    }
    decide_pairs(t, slot, c, pairs, mine, value, index);
    return decided + pairs;
}

// The pairs of tile t that are listed, with columns counted from c.
void Nearest::decide_pairs(int64_t t, int64_t slot, int64_t c, int64_t count, Scratch& mine, float* value,
                           int64_t* index) const {
    for (int64_t p = 0; p < count; p += DECIDED) {
        const int64_t some = std::min(DECIDED, count - p);
        const float *x[DECIDED], *y[DECIDED];
        double square[DECIDED];
        for (int64_t i = 0; i < some; ++i) {
            x[i] = mine.x[slot * height_ + mine.pairs[p + i].row];
            y[i] = column(c + mine.pairs[p + i].column);
        }
        if (what_ == Value::sq_distance) tile_.lines.sq_distances(x, y, some, d_, square);
        for (int64_t i = 0; i < some; ++i) {
            mine.own[p + i] = what_ == Value::cosine
                                  ? std::clamp(tile_.lines.dot(x[i], y[i], d_), -1.0f, 1.0f)
                                  : static_cast<float>(square[i]);
        }
    }
    for (int64_t p = 0; p < count; ++p) {
        const int64_t i = t * height_ + mine.pairs[p].row;
        offer(mine.own[p], start_ + number_[c + mine.pairs[p].column], value[i], index[i]);
    }
}

// Every pair of `rows` rows of the tile from row `begin` on; cosines only.
void Nearest::decide_all(int64_t t, int64_t slot, int64_t begin, int64_t rows, int64_t c, int64_t count,
                         int32_t* list, Scratch& mine, float* value, int64_t* index) const {
    const int64_t first = slot * height_;
    for (int64_t j = 0; j < count; j += 4) {
        const float* four[4];
        for (int64_t i = 0; i < 4; ++i) four[i] = column(c + std::min(j + i, count - 1));
        tile_.lines.dots(mine.x.get() + first + begin, rows, four, d_, mine.scores.get() + begin * group_ + j,
                         group_);
    }
    for (int64_t r = begin; r < begin + rows; ++r) {
        const int64_t i = t * height_ + r;
        if (!mine.open[first + r]) continue;
        float* const score = mine.scores.get() + r * group_;
        for (int64_t j = 0; j < count; ++j) score[j] = std::clamp(score[j], -1.0f, 1.0f);
        std::fill(score + count, score + std::min(round_up(count, SELECTED), group_), -INFINITY);
        int32_t top;
        if (tile_.lines.select(score, count, value[i], 0, list, &top) == 0) continue;
        offer(score[list[0]], start_ + number_[c + list[0]], value[i], index[i]);
    }
}

// Keep the better value, of equal ones the smaller number.
void Nearest::offer(float own, int64_t number, float& value, int64_t& index) const {
    const bool better = what_ == Value::cosine ? own > value : own < value;
    if (!better && !(own == value && number < index)) return;
    value = own;
    index = number;
}

// A column whose score is below this by more than its error has no better value.
float Nearest::limit_for(float value, float norm, float offset) const {
    if (what_ == Value::cosine) return value - offset - 8 * gamma_;
    return (norm * norm - value) / 2 - gamma_ * (4 * norm * norm + value);
}

}  // namespace dinofast
