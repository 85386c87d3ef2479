// Element-wise functions that torch does not round correctly on the CPU.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "pool.h"

namespace triloom {

// In place, correctly rounded; f32 or f64. (torch.sqrt on the CPU may go through a vector math
// library that is off by one unit in the last place.)
void sqrt_in_place(void* data, DType dtype, int64_t n, Pool* pool);

}  // namespace triloom
