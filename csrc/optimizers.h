// Element-wise and block-wise updates besides AdamW's, on flat arrays.
#pragma once

#include <array>
#include <cstdint>

#include "adamw.h"
#include "dtype.h"
#include "pool.h"

namespace triloom {

// What every rule updates.
struct Piece {
    void* param;
    const void* grad;
    void* low;          // null, or receives the new parameters in low_dtype
    DType own;          // f32 or f64: the parameters, and the states unless said otherwise
    DType grad_dtype;   // own or narrower
    DType low_dtype;
    int64_t n;
};

// Numbers are computed by the caller in double and rounded once to the parameters' type.
struct SgdNumbers {
    double grad_scale, weight_decay, momentum, lr;
};

struct LionNumbers {
    double grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, lr;
};

// Elements that share one largest magnitude.
constexpr int64_t kBlock = 64;

struct BlockStates {
    uint8_t* exp_avg;      // n codes
    void* exp_avg_max;     // n / kBlock magnitudes
    uint8_t* root;         // of the second moment
    void* root_max;
    const void* tables;    // signed numbers, signed bounds, unsigned numbers, unsigned bounds: 256 each
};

// Orders of operations: runtime/triloom/optim/kernels.py. momentum may be null.
void sgd(const Piece& piece, void* momentum, bool nesterov, const SgdNumbers& numbers, Pool* pool);
void lion(const Piece& piece, void* exp_avg, const LionNumbers& numbers, Pool* pool);
void adamw8(const Piece& piece, const BlockStates& states, const AdamWNumbers& numbers, Pool* pool);

}  // namespace triloom
