// Which instruction set runs: the best this processor has, or the one that DINOFAST_ISA names.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "int8_tile.h"
#include "tile.h"

namespace dinofast {

// Worst first; the last is the default.
inline const std::vector<const Tile*>& available_tiles() {
    static const std::vector<const Tile*> tiles = [] {
        std::vector<const Tile*> found{&baseline_tile};
#ifdef DINOFAST_X86
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2) found.push_back(&avx2_tile);
        if (avx2 && __builtin_cpu_supports("avx512f")) found.push_back(&avx512_tile);
#endif
        return found;
    }();
    return tiles;
}

// Throws std::invalid_argument when DINOFAST_ISA names nothing that this processor has.
inline const Tile& chosen_tile() {
    const char* wanted = std::getenv("DINOFAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return *available_tiles().back();
    std::string names;
    for (const Tile* tile : available_tiles()) {
        if (std::string(wanted) == tile->name) return *tile;
        names += std::string(names.empty() ? "" : ", ") + tile->name;
    }
    throw std::invalid_argument("DINOFAST_ISA=" + std::string(wanted) +
                                ": unknown or not on this processor; available: " + names);
}

// What goes with the chosen tile; the plain one where the processor has no such instructions.
inline const Int8Tile& chosen_int8_tile() {
#ifdef DINOFAST_X86
    if (&chosen_tile() == &avx512_tile && __builtin_cpu_supports("avx512vnni")) return avx512_vnni_tile;
#endif
    return baseline_int8_tile;
}

}  // namespace dinofast
