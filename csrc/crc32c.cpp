#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
#define TRILOOM_CRC_TARGET __attribute__((target("sse4.2")))
#define TRILOOM_CRC_INSTRUCTION 1
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define TRILOOM_CRC_TARGET
#define TRILOOM_CRC_INSTRUCTION 1
#endif

namespace triloom {

namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;

using Table = std::array<std::array<uint32_t, 256>, 8>;

// Row k: the effect of a byte that is followed by k zero bytes.
constexpr Table make_table() {
    Table t{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ ((c & 1u) ? kPolynomial : 0u);
        t[0][i] = c;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t i = 0; i < 256; ++i) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xFFu];
    return t;
}

constexpr Table kTable = make_table();

uint64_t load64(const unsigned char* p) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    return v;
}

// Eight bytes at a time: their effects are independent and are looked up together.
uint32_t update_by_table(uint32_t c, const unsigned char* p, int64_t n) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; n >= 8; n -= 8, p += 8) {
        const uint64_t v = load64(p) ^ c;
        c = 0;
        for (size_t k = 0; k < 8; ++k) c ^= kTable[7 - k][(v >> (8 * k)) & 0xFFu];
    }
#endif
    for (; n > 0; --n, ++p) c = (c >> 8) ^ kTable[0][(c ^ *p) & 0xFFu];
    return c;
}

#ifdef TRILOOM_CRC_INSTRUCTION

// The instruction has a latency of three cycles and starts one a cycle: three lanes of this length run at once,
// and their checksums are joined.
constexpr int64_t kLane = 4096;

// What kLane zero bytes make of a checksum: linear over GF(2), so it is looked up byte by byte.
using Skip = std::array<std::array<uint32_t, 256>, 4>;

const Skip& skip_lane() {
    static const Skip skip = [] {
        const std::array<unsigned char, kLane> zeros{};
        std::array<uint32_t, 32> of_bit{};
        for (size_t bit = 0; bit < 32; ++bit) of_bit[bit] = update_by_table(uint32_t{1} << bit, zeros.data(), kLane);
        Skip s{};
        for (size_t k = 0; k < 4; ++k)
            for (size_t i = 0; i < 256; ++i)
                for (size_t bit = 0; bit < 8; ++bit)
                    if (i >> bit & 1u) s[k][i] ^= of_bit[8 * k + bit];
        return s;
    }();
    return skip;
}

uint32_t skip(const Skip& s, uint32_t c) {
    return s[0][c & 0xFFu] ^ s[1][c >> 8 & 0xFFu] ^ s[2][c >> 16 & 0xFFu] ^ s[3][c >> 24];
}

TRILOOM_CRC_TARGET uint64_t word(uint64_t c, uint64_t v) {
#ifdef __x86_64__
    return _mm_crc32_u64(c, v);
#else
    return __crc32cd(static_cast<uint32_t>(c), v);
#endif
}

TRILOOM_CRC_TARGET uint32_t update_by_instruction(uint32_t crc, const unsigned char* p, int64_t n) {
    const Skip& s = skip_lane();
    for (; n >= 3 * kLane; n -= 3 * kLane, p += 3 * kLane) {
        uint64_t a = crc, b = 0, c = 0;
        for (int64_t i = 0; i < kLane; i += 8) {
            a = word(a, load64(p + i));
            b = word(b, load64(p + kLane + i));
            c = word(c, load64(p + 2 * kLane + i));
        }
        crc = skip(s, skip(s, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
    }
    uint64_t rest = crc;
    for (; n >= 8; n -= 8, p += 8) rest = word(rest, load64(p));
    return update_by_table(static_cast<uint32_t>(rest), p, n);
}

#endif

}  // namespace

bool crc32c_has_instruction() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("sse4.2") != 0;
#elif defined(TRILOOM_CRC_INSTRUCTION)
    return true;
#else
    return false;
#endif
}

uint32_t crc32c_by_table(const void* data, int64_t n, uint32_t crc) {
    return ~update_by_table(~crc, static_cast<const unsigned char*>(data), n);
}

uint32_t crc32c(const void* data, int64_t n, uint32_t crc) {
#ifdef TRILOOM_CRC_INSTRUCTION
    static const bool fast = crc32c_has_instruction();
    if (fast) return ~update_by_instruction(~crc, static_cast<const unsigned char*>(data), n);
#endif
    return crc32c_by_table(data, n, crc);
}

}  // namespace triloom
