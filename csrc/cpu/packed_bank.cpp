#include "packed_bank.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>

#include "int8_tile.h"
#include "memory.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr double HUGE_SQUARE = 0x1p120;

}  // namespace

Quantized quantize(const float* x, int64_t d, int8_t* codes) {
    float peak = 0;
    double norm = 0;
    for (int64_t k = 0; k < d; ++k) {
        peak = std::max(peak, std::abs(x[k]));
        norm += static_cast<double>(x[k]) * x[k];
    }
    const bool usable = peak > 1e-30f && peak < 1e30f;
    const float scale = usable ? peak / 127 : 0, inverse = usable ? 127 / peak : 0;
    double rest = 0;
    int32_t sum = 0;
    for (int64_t k = 0; k < d; ++k) {
        const int code = usable ? static_cast<int>(x[k] * inverse + (x[k] < 0 ? -0.5f : 0.5f)) : 0;
        const double left = x[k] - static_cast<double>(scale) * code;
        codes[k] = static_cast<int8_t>(code);
        sum += code;
        rest += left * left;
    }
    constexpr double UP = 1 + 1e-6;
    return {scale, static_cast<float>(UP * std::sqrt(rest)), static_cast<float>(UP * std::sqrt(norm)), sum};
}

float quantization_error(float norm, float rest, float weight, float gamma) {
    const double n = norm + rest, r = rest, w = weight;
    return static_cast<float>(1.00001 * ((w * n * n + r * r / w) / 2 + gamma * n * n / 2)) + TINY;
}

float Outline::error(int64_t d) const {
    const double e = weight[2], rounding = product_error(d) * std::sqrt(static_cast<double>(depth));
    const double error = 1.01 * (rounding + e);
    return error >= 0 && error < 0.05 ? static_cast<float>(error) : INFINITY;
}

float Outline::slack(int64_t d, double sq_norm) const {
    return static_cast<float>(1.0001 * (product_error(d) + 4.0 * error(d)) * sq_norm / 2);
}

// With rest r = x - basis v: |r|^2 = |x|^2 - |v|^2 + 2 v (v - basis^T x) + v (basis^T basis - 1) v, and the
// last two are at most 3 error |x|^2.
float Outline::rest(int64_t d, double sq_norm, double inside) const {
    const double rest = std::max(sq_norm - inside, 0.0) + 3.0 * error(d) * sq_norm;
    return static_cast<float>((1 + 1e-6) * std::sqrt(rest));
}

namespace {

constexpr int64_t COLUMNS = Int8Tile::COLUMNS;

// One set of codes of all columns, and what their bounds are made of.
class Codes {
  public:
    Codes(int64_t columns, int64_t channels, uint8_t* codes, float* scale, float* bias, float* weight)
        : columns_(columns),
          bytes_(quads(channels) * 4),
          channels_(channels),
          codes_(codes),
          scale_(scale),
          bias_(bias),
          weight_(weight),
          rest_(allocate<float>(columns)),
          norm_(allocate<float>(columns)) {}

    void clear(int64_t panel) {
        std::fill_n(codes_ + panel * COLUMNS * bytes_, COLUMNS * bytes_, uint8_t{128});
        for (int64_t c = panel * COLUMNS; c < (panel + 1) * COLUMNS; ++c) {
            scale_[c] = rest_[c] = norm_[c] = 0;
            bias_[c] = -INFINITY;
        }
    }

    // `usable`: no sum of x overflows. The buffer holds round_up(channels, 4) bytes.
    void fill(int64_t column, const float* x, double bias, bool usable, int8_t* buffer) {
        bias_[column] = usable ? static_cast<float>(bias) : INFINITY;
        if (!usable) return;
        uint8_t* const out = codes_ + column / COLUMNS * COLUMNS * bytes_;
        const int64_t c = column % COLUMNS;
        const Quantized found = quantize(x, channels_, buffer);
        for (int64_t k = 0; k < channels_; ++k) {
            out[(k / 4 * COLUMNS + c) * 4 + k % 4] = static_cast<uint8_t>(buffer[k] + 128);
        }
        scale_[column] = found.scale;
        rest_[column] = found.rest;
        norm_[column] = found.norm;
    }

    // Put the errors into the biases, and the largest of each panel into `error` if it is one.
    void finish(float gamma, float* error) {
        const double rests = std::accumulate(rest_.get(), rest_.get() + columns_, 0.0);
        const double norms = std::accumulate(norm_.get(), norm_.get() + columns_, 0.0);
        const double weight = rests / norms;
        *weight_ = weight > 1e-4 && weight < 1 ? static_cast<float>(weight) : weight < 1 ? 1e-4f : 0.01f;
        if (error != nullptr) std::fill_n(error, columns_ / COLUMNS, 0.0f);
        for (int64_t c = 0; c < columns_; ++c) {
            const bool huge = !(bias_[c] < INFINITY);
            const float off = huge ? INFINITY : quantization_error(norm_[c], rest_[c], *weight_, gamma);
            bias_[c] += off;
            if (error != nullptr) error[c / COLUMNS] = std::max(error[c / COLUMNS], off);
        }
    }

  private:
    int64_t columns_, bytes_, channels_;
    uint8_t* codes_;
    float *scale_, *bias_, *weight_;
    Array<float> rest_, norm_;
};

// The outlines of all columns.
class Outlines {
  public:
    Outlines(const Tile& tile, const PackedBank& bank)
        : lines_(tile.lines),
          outline_(bank.outline),
          d_(bank.rows.rows.d),
          columns_(bank.columns),
          levels_{codes(0), codes(1)} {}

    void clear(int64_t panel) {
        for (int i = 0; i < 2; ++i) {
            levels_[i].clear(panel);
            float* const tail = outline_.tail + i * columns_ + panel * COLUMNS;
            std::fill(tail, tail + COLUMNS, 0.0f);
        }
    }

    // The outline of x (d,), whose squared norm is `square`. The buffers hold H floats and round_up(H, 4)
    // bytes.
    void fill(int64_t column, const float* x, double square, double bias, bool usable, float* drawn,
              int8_t* buffer) {
        const int64_t depth = outline_.depth;
        std::fill(drawn, drawn + depth, 0.0f);
        for (int64_t k = 0; usable && k < d_; ++k) {
            lines_.add_scaled(outline_.basis + k * depth, x[k], depth, drawn);
        }
        double inside = 0;
        for (int i = 0; i < 2; ++i) {
            const float* const part = drawn + outline_.first(i);
            for (int64_t j = 0; j < outline_.channels(i); ++j)
                inside += static_cast<double>(part[j]) * part[j];
            const double own = i == 0 ? bias + outline_.slack(d_, square) : 0;
            levels_[i].fill(column, part, own, usable, buffer);
            if (usable) outline_.tail[i * columns_ + column] = outline_.rest(d_, square, inside);
        }
    }

    void finish() {
        for (Codes& level : levels_) level.finish(0, nullptr);
        for (int64_t c = 0; c < columns_; ++c) outline_.bias[columns_ + c] += outline_.bias[c];
    }

  private:
    Codes codes(int i) const {
        const Outline::Level level = outline_.level(i, columns_);
        return {columns_, outline_.channels(i), level.codes, level.scale, level.bias, outline_.weight + i};
    }

    const Lines& lines_;
    const Outline& outline_;
    int64_t d_, columns_;
    Codes levels_[2];
};

}  // namespace

void quantize_bank(const Tile& tile, const PackedBank& bank, Metric metric, int threads) {
    const int64_t d = bank.rows.rows.d, panels = bank.columns / COLUMNS;
    const bool outlined = bank.groups > 0;
    const int64_t depth = outlined ? bank.outline.depth : 0, own = round_up(2 * d + depth + 16, 16);
    const Array<float> scratch = allocate<float>(own * threads), origin = allocate<float>(d);
    std::fill(origin.get(), origin.get() + d, 0.0f);
    std::optional<Codes> whole;
    std::optional<Outlines> outlines;
    if (outlined) outlines.emplace(tile, bank);
    if (bank.codes != nullptr) whole.emplace(bank.columns, d, bank.codes, bank.scale, bank.bias, bank.weight);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* const row = scratch.get() + own * thread_number();
        float* const drawn = row + d;
        int8_t* const codes = reinterpret_cast<int8_t*>(drawn + depth);
        for (int64_t p; (p = next.fetch_add(1)) < panels;) {
            if (outlines) outlines->clear(p);
            if (whole) whole->clear(p);
            for (int64_t column = p * COLUMNS; column < (p + 1) * COLUMNS; ++column) {
                const int64_t i = bank.row(column);
                if (i < 0) continue;
                const float* y = bank.rows.rows.get(i, row);
                const bool zero = metric == Metric::cosine && tile.lines.sq_distance(y, origin.get(), d) == 0;
                subtract(y, bank.center, d, row);
                const double square = tile.lines.sq_distance(row, origin.get(), d);
                const double bias = -square / 2 - (zero ? 0.5 : 0);
                const bool usable = square < HUGE_SQUARE;
                if (outlines) outlines->fill(column, row, square, bias, usable, drawn, codes);
                if (whole) whole->fill(column, row, bias, usable, codes);
            }
        }
    }
    if (outlines) outlines->finish();
    if (whole) whole->finish(product_error(d), bank.error);
}

}  // namespace dinofast
