// Reductions whose result does not depend on threads, alignment or the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "pool.h"

namespace triloom {

// Elements summed into one partial. Partials of an array cut at multiples of kSumBlock are the
// partials of its pieces.
// Small, because flat shards are cut at multiples of it (parallel/flat.py, ALIGN): the partials of a
// parameter are then the same however it is sharded.
constexpr int64_t kSumBlock = 64;

// partials[b] = sum of squares, in fp64, of block b (the last may be short: as if padded with
// zeros), by a balanced tree that adds the upper half onto the lower: 32 terms, 16, ... 1.
// Returns whether every element is finite.
bool sum_squares_partials(const void* data, DType dtype, int64_t n, double* partials, Pool* pool);

// Sum as high + low, high being the sum rounded to double. Carried in twice the precision of a double
// (relative error about n 2^-104), so that it does not depend on order or grouping but for sums that
// lie that close to the middle between two pairs.
struct Wide {
    double high, low;
};
Wide wide_sum(const double* data, int64_t n);

enum class ReduceOp : int { sum = 0, max = 1, min = 2 };

// out[i] = ((x0[i] op x1[i]) op x2[i]) ... over the inputs in order: in fp32 rounded once to nearest
// even for 16-bit floats, in the own type otherwise; int64 sums wrap; max and min propagate NaN.
// out may be one of the inputs.
void reduce_ranks(void* out, const std::vector<const void*>& inputs, DType dtype, int64_t n, ReduceOp op, Pool* pool);

}  // namespace triloom
