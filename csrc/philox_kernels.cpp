#include "philox_kernels.h"

#include <cmath>

namespace triloom {

namespace {

constexpr double kTwo52 = 0x1p52;
constexpr double kLn2 = 0.69314718055994530942;
constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kTurn = 6.28318530717958647693 * 0x1p-32;  // radians in one step of a word

// Exact, and in a form that every instruction set can do in vectors.
TRILOOM_INLINE double to_double(uint64_t below_2_52) {
    return bit_cast<double>(below_2_52 | 0x4330000000000000u) - kTwo52;
}

// ln((w + 1/2) / 2^32). With u = m 2^e, sqrt(1/2) <= m < sqrt(2), and s = (m - 1) / (m + 1):
// ln u = e ln 2 + 2 artanh(s), artanh(s) = s + s^3/3 + s^5/5 + ...; |s| < 0.172, so the term in
// s^23 is below 2^-57 of the first.
TRILOOM_INLINE double log_of_word(uint32_t w) {
    const double u = (to_double(w) + 0.5) * 0x1p-32;
    const uint64_t bits = bit_cast<uint64_t>(u);
    const double half = bit_cast<double>((bits & 0x000fffffffffffffu) | 0x3fe0000000000000u);  // [1/2, 1)
    const double exponent = to_double(bits >> 52) - 1022.0;
    const bool low = half < kSqrtHalf;
    const double m = low ? half * 2.0 : half;
    const double e = low ? exponent - 1.0 : exponent;
    const double s = (m - 1.0) / (m + 1.0);
    const double z = s * s;
    double p = 1.0 / 23;
    p = p * z + 1.0 / 21;
    p = p * z + 1.0 / 19;
    p = p * z + 1.0 / 17;
    p = p * z + 1.0 / 15;
    p = p * z + 1.0 / 13;
    p = p * z + 1.0 / 11;
    p = p * z + 1.0 / 9;
    p = p * z + 1.0 / 7;
    p = p * z + 1.0 / 5;
    p = p * z + 1.0 / 3;
    const double twice = s + s;
    return e * kLn2 + (twice + twice * z * p);
}

struct Point {
    double cosine, sine;
};

// cos and sin of 2 pi w / 2^32: the nearest quarter turn is taken off exactly, in integers, and the
// rest, at most pi/4, goes into the Taylor series up to x^18 and x^19.
TRILOOM_INLINE Point on_circle(uint32_t w) {
    const uint32_t quarter = (w + 0x20000000u) >> 30;
    const int32_t rest = static_cast<int32_t>(w - (quarter << 30));
    const double x = static_cast<double>(rest) * kTurn;
    const double z = x * x;
    double c = -1.0 / 6402373705728000.0;
    c = c * z + 1.0 / 20922789888000.0;
    c = c * z - 1.0 / 87178291200.0;
    c = c * z + 1.0 / 479001600.0;
    c = c * z - 1.0 / 3628800.0;
    c = c * z + 1.0 / 40320.0;
    c = c * z - 1.0 / 720.0;
    c = c * z + 1.0 / 24.0;
    c = c * z - 0.5;
    c = c * z + 1.0;
    double s = -1.0 / 121645100408832000.0;
    s = s * z + 1.0 / 355687428096000.0;
    s = s * z - 1.0 / 1307674368000.0;
    s = s * z + 1.0 / 6227020800.0;
    s = s * z - 1.0 / 39916800.0;
    s = s * z + 1.0 / 362880.0;
    s = s * z - 1.0 / 5040.0;
    s = s * z + 1.0 / 120.0;
    s = s * z - 1.0 / 6.0;
    s = x + x * z * s;
    const bool swap = (quarter & 1u) != 0;
    const double a = swap ? s : c;
    const double b = swap ? c : s;
    return {((quarter + 1u) & 2u) ? -a : a, (quarter & 2u) ? -b : b};
}

template <class T>
TRILOOM_INLINE void drop_body(const uint32_t* __restrict words, int64_t n, uint32_t threshold, compute_t<T> scale,
                              const T* __restrict in, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
        const T kept = narrow<T>(widen(in[i]) * scale);
        out[i] = words[i] < threshold ? T{} : kept;
    }
}

}  // namespace

TRILOOM_CLONES void philox_words(uint64_t key, uint64_t counter, int64_t count, uint32_t* __restrict out) {
    for (int64_t j = 0; j < count; ++j) {
        const uint64_t at = counter + static_cast<uint64_t>(j);
        const auto words = philox_block({static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), 0, 0},
                                        {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
        for (int lane = 0; lane < 4; ++lane) out[4 * j + lane] = words[static_cast<size_t>(lane)];
    }
}

TRILOOM_CLONES void normals(const uint32_t* __restrict words, int64_t n, double mean, double std,
                            double* __restrict out) {
    for (int64_t i = 0; i < n; i += 2) {
        const double radius = std::sqrt(-2.0 * log_of_word(words[i]));
        const Point p = on_circle(words[i + 1]);
        out[i] = mean + std * (radius * p.cosine);
        out[i + 1] = mean + std * (radius * p.sine);
    }
}

TRILOOM_CLONES void uniforms(const uint32_t* __restrict words, int64_t n, double low, double span,
                             double* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = low + span * (to_double(words[i]) * 0x1p-32);
}

TRILOOM_CLONES void drop(const uint32_t* words, int64_t n, uint32_t threshold, float scale, const float* in, float* out) {
    drop_body(words, n, threshold, scale, in, out);
}
TRILOOM_CLONES void drop(const uint32_t* words, int64_t n, uint32_t threshold, double scale, const double* in,
                         double* out) {
    drop_body(words, n, threshold, scale, in, out);
}
TRILOOM_CLONES void drop(const uint32_t* words, int64_t n, uint32_t threshold, float scale, const bf16* in, bf16* out) {
    drop_body(words, n, threshold, scale, in, out);
}
TRILOOM_CLONES void drop(const uint32_t* words, int64_t n, uint32_t threshold, float scale, const f16* in, f16* out) {
    drop_body(words, n, threshold, scale, in, out);
}

TRILOOM_CLONES void round_randomly(const uint32_t* __restrict words, int64_t n, const float* __restrict in,
                                   bf16* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(in[i]);
        const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        const uint32_t quiet = (bits & 0x007fffffu) ? 0x00400000u : 0u;  // a NaN whose payload is cut off
        const uint32_t up = finite ? bits + (words[i] & 0xffffu) : bits | quiet;
        out[i].bits = static_cast<uint16_t>(up >> 16);
    }
}

}  // namespace triloom
