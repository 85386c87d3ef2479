#pragma once

#include <cstdint>

namespace triloom {

// Keep freed memory of up to `keep` bytes in the process and serve blocks of up to `largest` bytes from
// the heap. Returns whether the C library could do it (glibc).
bool keep_heap(int64_t keep, int64_t largest);

}  // namespace triloom
