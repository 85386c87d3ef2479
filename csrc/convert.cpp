#include "convert.h"

namespace triloom {

namespace {

template <class To, class From>
TRILOOM_INLINE void widen_body(To* __restrict dst, const From* __restrict src, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<To>(widen(src[i]));
}

template <class To, class From>
TRILOOM_INLINE void narrow_body(To* __restrict dst, const From* __restrict src, int64_t n) {
    for (int64_t i = 0; i < n; ++i) dst[i] = narrow<To>(static_cast<compute_t<To>>(src[i]));
}

}  // namespace

// The loader picks clones by symbol, so each instance is a plain function.
#define TRILOOM_LOAD(NAME, TO, FROM)                             \
    TRILOOM_CLONES void NAME(TO* dst, const FROM* src, int64_t n) { \
        widen_body(dst, src, n);                                 \
    }
#define TRILOOM_STORE(NAME, TO, FROM)                            \
    TRILOOM_CLONES void NAME(TO* dst, const FROM* src, int64_t n) { \
        narrow_body(dst, src, n);                                \
    }

TRILOOM_LOAD(load_f32_bf16, float, bf16)
TRILOOM_LOAD(load_f32_f16, float, f16)
TRILOOM_LOAD(load_f64_f32, double, float)
TRILOOM_LOAD(load_f64_bf16, double, bf16)
TRILOOM_LOAD(load_f64_f16, double, f16)
TRILOOM_STORE(store_bf16_f32, bf16, float)
TRILOOM_STORE(store_f16_f32, f16, float)
TRILOOM_STORE(store_f32_f64, float, double)
TRILOOM_STORE(store_bf16_f64, bf16, double)
TRILOOM_STORE(store_f16_f64, f16, double)

void load(float* dst, const void* src, DType dtype, int64_t n) {
    switch (dtype) {
        case DType::f32: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float)); return;
        case DType::bf16: return load_f32_bf16(dst, static_cast<const bf16*>(src), n);
        case DType::f16: return load_f32_f16(dst, static_cast<const f16*>(src), n);
        default: throw Error("only f32, bf16 and f16 can be read as f32");
    }
}

void load(double* dst, const void* src, DType dtype, int64_t n) {
    switch (dtype) {
        case DType::f64: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(double)); return;
        case DType::f32: return load_f64_f32(dst, static_cast<const float*>(src), n);
        case DType::bf16: return load_f64_bf16(dst, static_cast<const bf16*>(src), n);
        case DType::f16: return load_f64_f16(dst, static_cast<const f16*>(src), n);
        default: throw Error("only floating-point types can be read as f64");
    }
}

void store(void* dst, DType dtype, const float* src, int64_t n) {
    switch (dtype) {
        case DType::f32: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float)); return;
        case DType::bf16: return store_bf16_f32(static_cast<bf16*>(dst), src, n);
        case DType::f16: return store_f16_f32(static_cast<f16*>(dst), src, n);
        default: throw Error("f32 can be stored only as f32, bf16 and f16");
    }
}

void store(void* dst, DType dtype, const double* src, int64_t n) {
    switch (dtype) {
        case DType::f64: std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(double)); return;
        case DType::f32: return store_f32_f64(static_cast<float*>(dst), src, n);
        case DType::bf16: return store_bf16_f64(static_cast<bf16*>(dst), src, n);
        case DType::f16: return store_f16_f64(static_cast<f16*>(dst), src, n);
        default: throw Error("f64 can be stored only as a floating-point type");
    }
}

}  // namespace triloom
