// Element types and the conversions between them, in bits: no compiler support for 16-bit floats
// is assumed, and flush-to-zero modes do not change a result.
#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"
#include "error.h"

namespace triloom {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, i64 = 4 };
constexpr int kDTypes = 5;

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline int64_t item_size(DType t) {
    constexpr int64_t sizes[kDTypes] = {4, 8, 2, 2, 8};
    return sizes[static_cast<int>(t)];
}

inline DType dtype_of(int code) {
    if (code < 0 || code >= kDTypes) throw Error("dtype code " + std::to_string(code) + " is not one of 0..4");
    return static_cast<DType>(code);
}

template <class To, class From>
TRILOOM_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The type a value is computed in: its own, or fp32 for 16-bit floats.
template <class T>
struct Compute {
    using type = T;
};
template <>
struct Compute<bf16> {
    using type = float;
};
template <>
struct Compute<f16> {
    using type = float;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class T>
TRILOOM_INLINE T widen(T x) {
    return x;
}

TRILOOM_INLINE float widen(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

TRILOOM_INLINE float widen(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t exponent = x.bits & 0x7c00u;
    const uint32_t mantissa = x.bits & 0x03ffu;
    // A subnormal is mantissa * 2^-24, made from an integer so that no fp32 subnormal appears.
    const uint32_t small = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(mantissa)) * 0x1p-24f);
    const uint32_t normal = ((exponent | mantissa) << 13) + (112u << 23);
    const uint32_t special = 0x7f800000u | (mantissa << 13);
    const uint32_t magnitude = exponent == 0 ? small : exponent == 0x7c00u ? special : normal;
    return bit_cast<float>(sign | magnitude);
}

// narrow<T>: round to nearest even; NaN stays NaN, overflow gives infinity.
template <class T>
struct Narrow {
    static TRILOOM_INLINE T from(T x) { return x; }
};

template <>
struct Narrow<bf16> {
    static TRILOOM_INLINE bf16 from(float x) {
        const uint32_t b = bit_cast<uint32_t>(x);
        const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
        const uint32_t quiet = (b >> 16) | 0x0040u;
        return {static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
    }
};

template <>
struct Narrow<f16> {
    static TRILOOM_INLINE f16 from(float x) {
        const uint32_t b = bit_cast<uint32_t>(x);
        const uint32_t sign = (b >> 16) & 0x8000u;
        const uint32_t a = b & 0x7fffffffu;
        // Below 2^-14: adding 1/2 aligns the mantissa so that the FPU rounds at bit 2^-24.
        const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - 0x3f000000u;
        const uint32_t normal = (a - (112u << 23) + 0x0fffu + ((a >> 13) & 1u)) >> 13;
        const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const uint32_t magnitude = a < 0x38800000u ? small : a >= 0x477ff000u ? special : normal;
        return {static_cast<uint16_t>(sign | magnitude)};
    }
};

template <class T>
TRILOOM_INLINE T narrow(compute_t<T> x) {
    return Narrow<T>::from(x);
}

}  // namespace triloom
