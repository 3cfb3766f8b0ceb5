#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dinofast {

// The number of this thread in its team.
inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace dinofast
