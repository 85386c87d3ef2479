#include "heap.h"

#include <algorithm>
#include <climits>

// After a standard header: that is what defines __GLIBC__.
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace triloom {

bool keep_heap(int64_t keep, int64_t largest) {
#if defined(__GLIBC__)
    const auto limited = [](int64_t bytes) { return static_cast<int>(std::min<int64_t>(bytes, INT_MAX)); };
    // Both: setting one alone switches glibc's own adjustment of the other off.
    return mallopt(M_TRIM_THRESHOLD, limited(keep)) == 1 && mallopt(M_MMAP_THRESHOLD, limited(largest)) == 1;
#else
    (void)keep;
    (void)largest;
    return false;
#endif
}

}  // namespace triloom
