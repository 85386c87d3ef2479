// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). A draw depends on the key and the element's index, and
// on nothing else: not on threads, shards, strides or the instruction set.
//
// Index i takes word i % 4 of philox(counter = i / 4, key). The transforms to doubles use only
// + - * / sqrt and integer operations, so that any other writer that keeps their order (the torch
// reference in philox.py, GPU kernels) gives the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "pool.h"

namespace triloom {

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// An N-d box of elements. Element (i0, i1, ...) lies at the sum of i*out (and of i*in where there
// is an input), counted in elements, and draws at base + the sum of i*index.
struct Axis {
    int64_t size, out, in, index;
};
struct Box {
    std::vector<Axis> axes;
    uint64_t key;
    uint64_t base;
};

// low + (high - low) * w / 2^32 for the word w.
void fill_uniform(void* out, DType dtype, const Box& box, double low, double high, Pool* pool);

// mean + std * z, z by Box-Muller (Ann. Math. Stat. 29, 1958) from words (0, 1) and (2, 3) of a counter:
// radius sqrt(-2 ln((w + 1/2) / 2^32)) of the first, angle 2 pi w / 2^32 of the second; the even
// lane takes the cosine, the odd one the sine.
void fill_normal(void* out, DType dtype, const Box& box, double mean, double std, Pool* pool);

// out = word < threshold ? 0 : in * scale. 16-bit floats are multiplied in fp32 and rounded once.
void dropout(void* out, const void* in, DType dtype, const Box& box, uint32_t threshold, double scale, Pool* pool);

// out (bf16) = in (fp32) rounded up or down by chance, up with the probability that makes the expectation exact.
void round_stochastic(void* out, const void* in, const Box& box, Pool* pool);

}  // namespace triloom
