// The loops over contiguous arrays under philox.h.
#pragma once

#include <array>
#include <cstdint>

#include "dtype.h"

namespace triloom {

// One application of Philox4x32-10.
TRILOOM_INLINE std::array<uint32_t, 4> philox_block(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
        const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
        c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
             static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return c;
}

// out[4j .. 4j+3] = philox(counter + j, key), j < count.
void philox_words(uint64_t key, uint64_t counter, int64_t count, uint32_t* out);

// out[i] = mean + std * z: two words make two normals; n is even.
void normals(const uint32_t* words, int64_t n, double mean, double std, double* out);

// out[i] = low + span * w / 2^32.
void uniforms(const uint32_t* words, int64_t n, double low, double span, double* out);

// out[i] = words[i] < threshold ? 0 : in[i] * scale.
void drop(const uint32_t* words, int64_t n, uint32_t threshold, float scale, const float* in, float* out);
void drop(const uint32_t* words, int64_t n, uint32_t threshold, double scale, const double* in, double* out);
void drop(const uint32_t* words, int64_t n, uint32_t threshold, float scale, const bf16* in, bf16* out);
void drop(const uint32_t* words, int64_t n, uint32_t threshold, float scale, const f16* in, f16* out);

// out[i] = in[i] cut to bf16 after the low 16 bits of words[i] were added to its own low 16 bits; what is not finite
// is cut as it is, a NaN stays one.
void round_randomly(const uint32_t* words, int64_t n, const float* in, bf16* out);

}  // namespace triloom
