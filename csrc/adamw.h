// AdamW (Loshchilov & Hutter, arXiv 1711.05101), element-wise on flat arrays.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "pool.h"

namespace triloom {

// Numbers of one update, computed by the caller in double and rounded once to the state's type.
struct AdamWNumbers {
    double grad_scale;            // multiplies the gradient first: unscale and clip
    double beta1, one_minus_beta1;
    double beta2, one_minus_beta2;
    double decay;                 // 1 - lr * weight_decay
    double rate;                  // lr / (1 - beta1^step)
    double inv_sqrt_correction;   // 1 / sqrt(1 - beta2^step)
    double eps;
};

struct AdamWArrays {
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    void* low;          // null, or receives the new parameters in low_dtype
    DType state_dtype;  // f32 or f64: param, exp_avg, exp_avg_sq
    DType grad_dtype;   // state_dtype or narrower
    DType low_dtype;
};

// For every i, in the state's type, each operation rounded once and in this order:
//   g = grad * grad_scale
//   m = beta1 * m + (1 - beta1) * g
//   v = beta2 * v + ((1 - beta2) * g) * g
//   p = p * decay - (rate * m) / (sqrt(v) * inv_sqrt_correction + eps)
// Any other writer of this update (GPU kernels, the torch reference) keeps this order.
void adamw(const AdamWArrays& a, int64_t n, const AdamWNumbers& numbers, Pool* pool);

}  // namespace triloom
