#include "elementwise.h"

#include <cmath>

namespace triloom {

namespace {

template <class T>
TRILOOM_INLINE void sqrt_body(T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);
}

constexpr int64_t kGrain = 1 << 15;

}  // namespace

TRILOOM_CLONES void sqrt_kernel(float* x, int64_t n) { sqrt_body(x, n); }
TRILOOM_CLONES void sqrt_kernel(double* x, int64_t n) { sqrt_body(x, n); }

void sqrt_in_place(void* data, DType dtype, int64_t n, Pool* pool) {
    require(n >= 0 && (n == 0 || data), "sqrt: a negative size or a null pointer");
    require(dtype == DType::f32 || dtype == DType::f64, "sqrt: the elements must be f32 or f64");
    parallel_for(pool, n, kGrain, [&](int64_t begin, int64_t end) {
        if (dtype == DType::f32)
            sqrt_kernel(static_cast<float*>(data) + begin, end - begin);
        else
            sqrt_kernel(static_cast<double*>(data) + begin, end - begin);
    });
}

}  // namespace triloom
