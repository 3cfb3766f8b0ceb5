// Queries quantized for the int8 sieve, Int8Tile::ROWS a tile.
#pragma once

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "packed_bank.h"

namespace dinofast {

// Queries collected for the sieve.
struct QueryTile {
    int32_t* codes;  // QueryCodes::codes_of_tile()
    float scale[Int8Tile::ROWS];
    int32_t sum[Int8Tile::ROWS];
};

class QueryCodes {
  public:
    QueryCodes(const Int8Tile& int8, int64_t tiles, int64_t channels)
        : int8_(int8),
          channels_(channels),
          quads_(quads(channels)),
          size_(round_up(quads_, QUADS) * ROWS),
          tiles_(allocate<int32_t>(tiles * size_)),
          sum_(allocate<int32_t>(tiles * ROWS)),
          scale_(allocate<float>(tiles * ROWS)),
          error_(allocate<float>(tiles * ROWS)) {
        std::fill_n(tiles_.get(), tiles * size_, 0);
    }

    // What query i's part of every score may err.
    float error(int64_t i) const { return error_[i]; }

    void clear(int64_t tile) {
        std::fill_n(tiles_.get() + tile * size_, size_, 0);
        std::fill_n(sum_.get() + tile * ROWS, ROWS, 0);
        std::fill_n(scale_.get() + tile * ROWS, ROWS, 0.0f);
        std::fill_n(error_.get() + tile * ROWS, ROWS, 0.0f);
    }

    // Put x - center (channels,) into the place of query i; see quantization_error. The buffer holds
    // 2 * (channels + 4) floats.
    void fill(int64_t i, const float* x, const float* center, float weight, float gamma, float* buffer) {
        int32_t* const out = tiles_.get() + i / ROWS * size_ + i % ROWS * QUADS;
        Quantized found;
        if (int8_.quantize != nullptr && channels_ > 0) {
            found =
                int8_.quantize(x, center, channels_, reinterpret_cast<int8_t*>(out), ROWS * Int8Tile::RUN);
        } else {
            found = plainly(x, center, buffer, out);
        }
        scale_[i] = found.scale;
        sum_[i] = found.sum;
        error_[i] = quantization_error(found.norm, found.rest, weight, gamma);
    }

    int64_t codes_of_tile() const { return size_; }

    // Collect n <= ROWS queries, -1 for none; what is left of the tile has scale 0.
    void gather(const int64_t* queries, int64_t n, QueryTile& tile) const {
        std::fill_n(tile.scale, ROWS, 0.0f);
        std::fill_n(tile.sum, ROWS, 0);
        for (int64_t r = 0; r < n; ++r) {
            const int64_t i = queries[r];
            if (i < 0) continue;
            const int32_t* const from = tiles_.get() + i / ROWS * size_ + i % ROWS * QUADS;
            for (int64_t quad = 0; quad < quads_; quad += QUADS) {
                std::memcpy(tile.codes + quad * ROWS + r * QUADS, from + quad * ROWS, Int8Tile::RUN);
            }
            tile.scale[r] = scale_[i];
            tile.sum[r] = sum_[i];
        }
    }

    // The codes, scales and sums of a tile's queries in order.
    const int32_t* codes(int64_t tile) const { return tiles_.get() + tile * size_; }
    const float* scale(int64_t tile) const { return scale_.get() + tile * ROWS; }
    const int32_t* sum(int64_t tile) const { return sum_.get() + tile * ROWS; }

    // Int8Tile::sieve of a tile over columns `first` to first + columns of a bank's codes, scales and biases.
    int64_t sieve(int64_t tile, const PackedBank& bank, int64_t first, int64_t columns,
                  const float* threshold, Hit* hits) const {
        return int8_.sieve(codes(tile), scale(tile), sum(tile), bank.codes + first * quads_ * 4, columns,
                           quads_, bank.scale + first, bank.bias + first, threshold, hits);
    }
    int64_t sieve(const QueryTile& tile, const PackedBank& bank, int64_t first, int64_t columns,
                  const float* threshold, Hit* hits) const {
        return int8_.sieve(tile.codes, tile.scale, tile.sum, bank.codes + first * quads_ * 4, columns, quads_,
                           bank.scale + first, bank.bias + first, threshold, hits);
    }

  private:
    static constexpr int ROWS = Int8Tile::ROWS, QUADS = Int8Tile::RUN / 4;

    // As Int8Tile::quantize.
    Quantized plainly(const float* x, const float* center, float* buffer, int32_t* out) const {
        int8_t* const codes = reinterpret_cast<int8_t*>(buffer + channels_);
        subtract(x, center, channels_, buffer);
        std::fill_n(codes, quads_ * 4, int8_t{0});
        const Quantized found = quantize(buffer, channels_, codes);
        for (int64_t quad = 0; quad < quads_; quad += QUADS) {
            const int64_t bytes = 4 * std::min<int64_t>(QUADS, quads_ - quad);
            std::memcpy(out + quad * ROWS, codes + quad * 4, static_cast<size_t>(bytes));
        }
        return found;
    }

    const Int8Tile& int8_;
    int64_t channels_, quads_, size_;
    Array<int32_t> tiles_, sum_;
    Array<float> scale_, error_;
};

}  // namespace dinofast
