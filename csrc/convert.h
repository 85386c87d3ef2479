// Arrays between storage and compute types, for kernels that work on blocks held in cache.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace triloom {

// Pieces a kernel converts at a time; a few of them fit the first-level cache.
constexpr int64_t kConvertBlock = 1024;

// dst[i] = src[i] exactly; src has dtype f32, bf16 or f16.
void load(float* dst, const void* src, DType dtype, int64_t n);
// src has dtype f64, f32, bf16 or f16.
void load(double* dst, const void* src, DType dtype, int64_t n);

// dst[i] = src[i] rounded to nearest even; from double through fp32, as torch's Tensor.to does.
void store(void* dst, DType dtype, const float* src, int64_t n);
void store(void* dst, DType dtype, const double* src, int64_t n);

}  // namespace triloom
