// Which instruction set runs: the best this processor has, or the one that DINOFAST_ISA names.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "int8_tile.h"
#include "tile.h"

namespace dinofast {

struct Isa {
    const char* name;
    const Tile& tile;
    const Int8Tile& int8;
};

// Worst first; the last is the default.
inline const std::vector<Isa>& available_isas() {
    static const std::vector<Isa> isas = [] {
        std::vector<Isa> found{{baseline_tile.name, baseline_tile, baseline_int8_tile}};
#ifdef DINOFAST_X86
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2) found.push_back({avx2_tile.name, avx2_tile, baseline_int8_tile});
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
        if (avx512) found.push_back({avx512_tile.name, avx512_tile, baseline_int8_tile});
        if (avx512 && __builtin_cpu_supports("avx512vnni")) {
            found.push_back({avx512_vnni_tile.name, avx512_tile, avx512_vnni_tile});
        }
#endif
        return found;
    }();
    return isas;
}

// Throws std::invalid_argument when DINOFAST_ISA names nothing that this processor has.
inline const Isa& chosen_isa() {
    const char* wanted = std::getenv("DINOFAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return available_isas().back();
    std::string names;
    for (const Isa& isa : available_isas()) {
        if (std::string(wanted) == isa.name) return isa;
        names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    throw std::invalid_argument("DINOFAST_ISA=" + std::string(wanted) +
                                ": unknown or not on this processor; available: " + names);
}

inline const Tile& chosen_tile() { return chosen_isa().tile; }

inline const Int8Tile& chosen_int8_tile() { return chosen_isa().int8; }

}  // namespace dinofast
