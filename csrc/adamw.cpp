#include "adamw.h"

#include <cmath>

#include "convert.h"

namespace triloom {

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at a time

template <class T>
struct Numbers {
    T grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, inv_sqrt_correction, eps;
};

template <class T>
Numbers<T> rounded(const AdamWNumbers& x) {
    const auto r = [](double v) { return static_cast<T>(v); };
    return {r(x.grad_scale),      r(x.beta1), r(x.one_minus_beta1), r(x.beta2),
            r(x.one_minus_beta2), r(x.decay), r(x.rate),            r(x.inv_sqrt_correction),
            r(x.eps)};
}

template <class T>
TRILOOM_INLINE void update(T* __restrict param, const T* __restrict grad, T* __restrict exp_avg,
                           T* __restrict exp_avg_sq, int64_t n, const Numbers<T>& c) {
    const Numbers<T> k = c;  // a local copy: stores to the arrays cannot change it
    for (int64_t i = 0; i < n; ++i) {
        const T g = grad[i] * k.grad_scale;
        const T m = k.beta1 * exp_avg[i] + k.one_minus_beta1 * g;
        const T v = k.beta2 * exp_avg_sq[i] + (k.one_minus_beta2 * g) * g;
        const T denominator = std::sqrt(v) * k.inv_sqrt_correction + k.eps;
        param[i] = param[i] * k.decay - (k.rate * m) / denominator;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
    }
}

}  // namespace

TRILOOM_CLONES void adamw_kernel(float* param, const float* grad, float* m, float* v, int64_t n,
                                 const Numbers<float>& c) {
    update(param, grad, m, v, n, c);
}

TRILOOM_CLONES void adamw_kernel(double* param, const double* grad, double* m, double* v, int64_t n,
                                 const Numbers<double>& c) {
    update(param, grad, m, v, n, c);
}

namespace {

template <class T>
void run(const AdamWArrays& a, DType own, int64_t n, const AdamWNumbers& numbers, Pool* pool) {
    const Numbers<T> c = rounded<T>(numbers);
    T* param = static_cast<T*>(a.param);
    T* m = static_cast<T*>(a.exp_avg);
    T* v = static_cast<T*>(a.exp_avg_sq);
    const char* grad = static_cast<const char*>(a.grad);
    char* low = static_cast<char*>(a.low);
    const bool direct = a.grad_dtype == own;
    // With a conversion the block must stay in cache between the passes; without one it need not end.
    const int64_t block = direct && !low ? kGrain : kConvertBlock;
    parallel_for(pool, n, kGrain, [&](int64_t begin, int64_t end) {
        T staged[kConvertBlock];
        for (int64_t i = begin; i < end; i += block) {
            const int64_t count = end - i < block ? end - i : block;
            const char* source = grad + i * item_size(a.grad_dtype);
            if (!direct) load(staged, source, a.grad_dtype, count);
            adamw_kernel(param + i, direct ? reinterpret_cast<const T*>(source) : staged, m + i, v + i, count, c);
            if (low) store(low + i * item_size(a.low_dtype), a.low_dtype, param + i, count);
        }
    });
}

// The loops assume separate arrays.
void require_apart(const AdamWArrays& a, int64_t n) {
    const int64_t state = n * item_size(a.state_dtype);
    const struct {
        const char* name;
        const void* data;
        int64_t size;
    } arrays[] = {{"param", a.param, state},
                  {"grad", a.grad, n * item_size(a.grad_dtype)},
                  {"exp_avg", a.exp_avg, state},
                  {"exp_avg_sq", a.exp_avg_sq, state},
                  {"low", a.low, a.low ? n * item_size(a.low_dtype) : 0}};
    for (const auto& x : arrays)
        for (const auto& y : arrays)
            if (&x < &y && x.size && y.size && overlap(x.data, x.size, y.data, y.size))
                throw Error(std::string("adamw: ") + x.name + " and " + y.name +
                            " overlap in memory; they must be separate");
}

}  // namespace

void adamw(const AdamWArrays& a, int64_t n, const AdamWNumbers& numbers, Pool* pool) {
    require(n >= 0, "adamw: the number of elements is negative");
    require(n == 0 || (a.param && a.grad && a.exp_avg && a.exp_avg_sq), "adamw: a null pointer with elements to update");
    require_apart(a, n);
    switch (a.state_dtype) {
        case DType::f32: return run<float>(a, DType::f32, n, numbers, pool);
        case DType::f64: return run<double>(a, DType::f64, n, numbers, pool);
        default: throw Error("adamw: the states must be f32 or f64");
    }
}

}  // namespace triloom
