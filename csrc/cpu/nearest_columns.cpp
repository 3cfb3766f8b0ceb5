// How Nearest prepares its columns.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "candidates.h"
#include "nearest.h"
#include "packed_bank.h"

namespace dinofast {
namespace {

constexpr int64_t SAMPLE = 16;  // columns whose mean is the center
constexpr float SHORT = 0.5f;   // squared norm to which a center of unit columns gains less than it costs

// Of the bits of floats that fill whole cache lines; four words at a time, each apart from the others.
uint64_t hash(const float* x, int64_t count) {
    constexpr uint64_t ODD = 0x9e3779b97f4a7c15u;
    uint64_t state[4] = {1, 2, 3, 4};
    const auto mix = [](uint64_t h, uint64_t word) { return ((h ^ word) << 29 | (h ^ word) >> 35) * ODD; };
    for (int64_t k = 0; k < count; k += 8) {
        uint64_t words[4];
        std::memcpy(words, x + k, sizeof words);
        for (int i = 0; i < 4; ++i) state[i] = mix(state[i], words[i]);
    }
    uint64_t all = 0;
    for (const uint64_t h : state) all = mix(all, h);
    return all ^ all >> 32;
}

}  // namespace

// Any center is right; near the mean, what is quantized is short. Without one, unit rows need not be written.
void Nearest::find_center() {
    const int64_t count = std::min(columns_.count, SAMPLE);
    const Array<float> row = allocate<float>(2 * d_);
    std::vector<double> sum(static_cast<size_t>(d_));
    int64_t whole = 0;
    for (int64_t s = 0; s < count; ++s) {
        const float* x = columns_.get(columns_.count * s / count, row.get() + d_);
        if (what_ == Value::cosine) {
            if (!tile_.normalize(x, d_, row.get(), DEPTH)) continue;
            x = row.get();
        }
        for (int64_t k = 0; k < d_; ++k) sum[static_cast<size_t>(k)] += x[k];
        ++whole;
    }
    std::fill(center_.get(), center_.get() + padded_, 0.0f);
    for (int64_t k = 0; k < d_ && whole > 0; ++k) {
        center_[k] = static_cast<float>(sum[static_cast<size_t>(k)] / static_cast<double>(whole));
    }
    center_square_ = static_cast<float>(tile_.lines.sq_distance(center_.get(), zero_.get(), d_));
    if (what_ == Value::sq_distance || center_square_ > SHORT) return;
    std::fill(center_.get(), center_.get() + padded_, 0.0f);
    center_square_ = 0;
    centered_ = false;
}

// Column j of the block, as `read` gives it. False when it holds NaN or inf.
bool Nearest::read_column(int64_t j, Scratch& mine) {
    const Lines& lines = tile_.lines;
    float* const copy = what_ == Value::cosine ? units_.get() + j * padded_ : mine.buffer.get();
    const float* const y = columns_.get(start_ + j, mine.buffer.get() + padded_);
    if (what_ == Value::cosine) {
        if (!tile_.normalize(y, d_, copy, DEPTH)) return false;
    } else {
        if (!std::isfinite(lines.sq_distance(y, zero_.get(), d_))) return false;
        std::copy(y, y + d_, copy);
    }
    std::fill(copy + d_, copy + padded_, 0.0f);
    hash_[j] = hash(copy, padded_);
    return true;
}

const float* Nearest::read(int64_t j) const {
    return what_ == Value::cosine ? units_.get() + j * padded_ : columns_.get(start_ + j, nullptr);
}

// Number the columns that no earlier one of the block equals bit for bit.
void Nearest::keep_distinct() {
    const uint64_t mask = static_cast<uint64_t>(table_size(read_)) - 1;
    std::fill(held_.get(), held_.get() + mask + 1, -1);
    count_ = 0;
    for (int64_t j = 0; j < read_; ++j) {
        const uint64_t own = hash_[j];
        const auto differs = [&](int64_t other) {
            return hash_[other] != own || std::memcmp(read(other), read(j), static_cast<size_t>(d_) * 4) != 0;
        };
        uint64_t at = own & mask;
        while (held_[at] >= 0 && differs(held_[at])) at = (at + 1) & mask;
        if (held_[at] >= 0) continue;
        held_[at] = static_cast<int32_t>(j);
        number_[count_++] = static_cast<int32_t>(j);
    }
}

// Distinct columns c to c + PANEL.
void Nearest::prepare_panel(int64_t c, Scratch& mine) {
    if (screen_ == Screen::int8) {
        std::memset(column_codes_.get() + c * quads_ * 4, 0, static_cast<size_t>(PANEL * quads_ * 4));
    }
    for (int64_t j = c; j < c + PANEL; ++j) {
        column_sum_[j] = 0;
        column_scale_[j] = column_rest_[j] = column_norm_[j] = own_[j] = 0;
        bias_[j] = plain_bias_[j] = -INFINITY;
        if (j < count_) prepare_column(j, mine);
    }
    const auto most = [c](const Array<float>& of) {
        return *std::max_element(of.get() + c, of.get() + c + PANEL);
    };
    panel_rest_[c / PANEL] = most(column_rest_);
    panel_norm_[c / PANEL] = most(column_norm_);
    panel_own_[c / PANEL] = most(own_);
    if (floats_) pack_floats(c, mine.buffer.get());
}

void Nearest::prepare_column(int64_t c, Scratch& mine) {
    const Lines& lines = tile_.lines;
    const float* const y = column(c);
    if (what_ == Value::cosine) {
        plain_bias_[c] = 0;
        bias_[c] = centered_ ? lines.dot(center_.get(), y, d_) : 0;
        own_[c] = 4 * gamma_;  // of bias, decision and sum
    }
    const double square = centered_ ? lines.sq_distance(y, center_.get(), d_) : 1;  // at most, of unit rows
    column_norm_[c] = static_cast<float>((1 + gamma_) * std::sqrt(square));
    if (what_ == Value::sq_distance) {
        plain_bias_[c] = bias_[c] = static_cast<float>(-square / 2);
        own_[c] = gamma_ * static_cast<float>(square) + TINY;
    }
    if (!(column_norm_[c] < HUGE_NORM)) {
        own_[c] = INFINITY;
        bias_[c] = plain_bias_[c] = 0;
    }
    if (screen_ != Screen::int8) return;
    int8_t* const codes = mine.code_buffer.get();
    const Quantized found = int8_.quantize(y, center_.get(), d_, codes, Int8Tile::RUN);
    column_sum_[c] = found.sum;
    column_scale_[c] = found.scale;
    column_rest_[c] = found.rest + gamma_ * (found.rest + column_norm_[c]);
    int8_t* const out = column_codes_.get() + (c / PANEL * quads_ * PANEL + c % PANEL) * 4;
    for (int64_t quad = 0; quad < quads_; ++quad) {
        std::memcpy(out + quad * PANEL * 4, codes + 4 * quad, 4);
    }
}

// Distinct columns c to c + PANEL for the float32 tile; of squared distances less the center.
void Nearest::pack_floats(int64_t c, float* buffer) {
    for (int64_t j = c; j < c + PANEL; j += tile_.columns) {
        for (int64_t i = j; i < j + tile_.columns; ++i) {
            float* const out = buffer + (i - j) * padded_;
            if (i >= count_) {
                std::fill(out, out + d_, 0.0f);
            } else if (what_ == Value::sq_distance) {
                subtract(column(i), center_.get(), d_, out);
            } else {
                std::copy(column(i), column(i) + d_, out);
            }
        }
        interleave(tile_, buffer, d_, panels_.get() + j * d_);
    }
}

}  // namespace dinofast
