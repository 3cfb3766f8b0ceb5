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
        decide_all(t, slot, 0, height_, c, count, mine, value, index);
        return 0;
    }
    const int64_t next = std::min((t + slots_) * height_, rows_.count);
    const int64_t rows_ahead = c + count < count_ ? 0 : std::min(height_, rows_.count - next);
    const int64_t lines = rows_.bytes(rows_ahead) / 64;
    if (int8) {
        int8_.products(reinterpret_cast<const int32_t*>(mine.codes.get() + first * code_size_),
                       mine.scale.get() + first, column_codes_.get() + c * quads_ * 4, count, quads_,
                       column_sum_.get() + c, column_scale_.get() + c, bias_.get() + c, mine.scores.get(),
                       group_, rows_.at(next), lines);
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
    float best[MAX_ROWS];
    int32_t top[MAX_ROWS];
    Error errors[MAX_ROWS];
    bool wanted[MAX_ROWS], full[MAX_ROWS] = {};  // rows of which some columns are decided, or all
    tile_.lines.highest(mine.scores.get(), group_, height_, count, best, top);
    int64_t pairs = 0;
    for (int64_t r = 0; r < height_; ++r) {
        const int64_t at = first + r;
        const float norm = mine.norm[at], rest = mine.rest[at];
        Error& error = errors[r];
        error.base = what_ == Value::cosine ? TINY : gamma_ * norm * norm + TINY;
        error.by_rest = int8 ? norm + rest : 0;
        error.by_norm = int8 ? rest : gamma_ * norm;
        error.most = error.base + error.by_rest * most_rest + error.by_norm * most_norm + most_own;
        wanted[r] = mine.open[at] &&
                    !(best[r] + error.most < limit_for(value[t * height_ + r], norm, mine.offset[at]));
        if (!wanted[r] || top[r] < 0) continue;
        mine.scores[r * group_ + top[r]] = -INFINITY;  // decided here
        mine.pairs[pairs++] = {static_cast<int32_t>(r), top[r], best[r]};
    }
    decide_pairs(t, slot, c, pairs, mine, value, index);
    int64_t decided = pairs;
    float limit[MAX_ROWS], least[MAX_ROWS];
    for (int64_t r = 0; r < height_; ++r) {
        limit[r] = least[r] = INFINITY;
        if (!wanted[r]) continue;  // of rows behind the last there is no value
        limit[r] = limit_for(value[t * height_ + r], mine.norm[first + r], mine.offset[first + r]);
        least[r] = limit[r] - errors[r].most;
    }
    const int64_t found =
        tile_.lines.not_below(mine.scores.get(), group_, height_, count, least, mine.pairs.get());
    if (what_ == Value::cosine && found * 3 > count) {
        int64_t of_row[MAX_ROWS] = {};
        for (int64_t f = 0; f < found; ++f) ++of_row[mine.pairs[f].row];
        for (int64_t r = 0; r < height_; ++r) {
            if (!wanted[r] || of_row[r] <= 4 || of_row[r] * 3 <= count) continue;
            full[r] = true;
            decided += of_row[r];
        }
    }
    pairs = 0;
    for (int64_t f = 0; f < found; ++f) {
        const Hit pair = mine.pairs[f];
        const Error& error = errors[pair.row];
        const int64_t j = c + pair.column;
        const float own =
            error.base + error.by_rest * column_rest_[j] + error.by_norm * column_norm_[j] + own_[j];
        mine.pairs[pairs] = pair;
        pairs += wanted[pair.row] & !full[pair.row] & !(pair.score + own < limit[pair.row]);
    }
    decide_pairs(t, slot, c, pairs, mine, value, index);
    decided += pairs;
    for (int64_t r = 0; r < height_; ++r) {
        if (full[r]) decide_all(t, slot, r, 1, c, count, mine, value, index);
    }
    return decided;
}

// The pairs of tile t that are listed, with columns counted from c.
void Nearest::decide_pairs(int64_t t, int64_t slot, int64_t c, int64_t count, Scratch& mine, float* value,
                           int64_t* index) const {
    for (int64_t p = 0; p < count; p += DECIDED) {
        const int64_t some = std::min(DECIDED, count - p);
        const float *x[DECIDED], *y[DECIDED];
        float factor[DECIDED];
        double square[DECIDED];
        for (int64_t i = 0; i < some; ++i) {
            const int64_t at = slot * height_ + mine.pairs[p + i].row;
            x[i] = mine.x[at];
            factor[i] = mine.factor[at];
            y[i] = column(c + mine.pairs[p + i].column);
        }
        float* const own = mine.own.get() + p;
        if (what_ == Value::cosine) {
            tile_.lines.scaled_dots(x, factor, y, some, d_, own);
            for (int64_t i = 0; i < some; ++i) own[i] = std::clamp(own[i], -1.0f, 1.0f);
        } else {
            tile_.lines.sq_distances(x, y, some, d_, square);
            for (int64_t i = 0; i < some; ++i) own[i] = static_cast<float>(square[i]);
        }
    }
    for (int64_t p = 0; p < count; ++p) {
        const int64_t i = t * height_ + mine.pairs[p].row;
        offer(mine.own[p], start_ + number_[c + mine.pairs[p].column], value[i], index[i]);
    }
}

// Let the row be the unit row itself.
void Nearest::write_unit(int64_t at, Scratch& mine) const {
    const float factor = mine.factor[at];
    if (factor == 1) return;
    const float* const x = mine.x[at];
    float* const unit = mine.rows.get() + at * padded_;
    for (int64_t k = 0; k < d_; ++k) unit[k] = x[k] * factor;
    std::fill(unit + d_, unit + padded_, 0.0f);
    mine.x[at] = unit;
    mine.factor[at] = 1;
}

// Every pair of `rows` rows of the tile from row `begin` on; cosines only.
void Nearest::decide_all(int64_t t, int64_t slot, int64_t begin, int64_t rows, int64_t c, int64_t count,
                         Scratch& mine, float* value, int64_t* index) const {
    const int64_t first = slot * height_;
    for (int64_t r = begin; r < begin + rows; ++r) write_unit(first + r, mine);
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
        std::fill(score + count, score + round_up(count, PANEL), -INFINITY);
        float best;
        int32_t top;
        tile_.lines.highest(score, group_, 1, count, &best, &top);
        if (top < 0 || best < value[i]) continue;
        tile_.lines.not_below(score, group_, 1, count, &best, mine.pairs.get());
        offer(best, start_ + number_[c + mine.pairs[0].column], value[i], index[i]);
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
