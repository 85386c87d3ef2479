// The one error type of the extension; Python sees it as triloom._C.NativeError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace triloom {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void require(bool ok, const char* what) {
    if (!ok) throw Error(what);
}

// Whether [a, a + size_a) and [b, b + size_b) share a byte.
inline bool overlap(const void* a, int64_t size_a, const void* b, int64_t size_b) {
    const auto x = reinterpret_cast<std::uintptr_t>(a), y = reinterpret_cast<std::uintptr_t>(b);
    return x < y + static_cast<std::uintptr_t>(size_b) && y < x + static_cast<std::uintptr_t>(size_a);
}

}  // namespace triloom
