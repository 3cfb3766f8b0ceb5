#pragma once

namespace dinofast {

// Element types of the matrices that callers pass.
enum class Element : int { float32, bfloat16, float16 };

}  // namespace dinofast
