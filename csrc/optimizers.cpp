#include "optimizers.h"

#include "optimizers_sweep.h"

namespace triloom {

namespace {

template <class T>
struct Sgd {
    T grad_scale, weight_decay, momentum, lr;
};

template <class T>
struct LionOf {
    T grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, lr;
};

enum class Momentum { none, plain, nesterov };

template <Momentum kind, class T>
TRILOOM_INLINE void sgd_body(T* __restrict param, const T* __restrict grad, T* __restrict momentum, int64_t n,
                             const Sgd<T>& c) {
    const Sgd<T> k = c;  // a local copy: stores to the arrays cannot change it
    for (int64_t i = 0; i < n; ++i) {
        const T g = grad[i] * k.grad_scale + param[i] * k.weight_decay;
        T direction = g;
        if constexpr (kind != Momentum::none) {
            const T m = momentum[i] * k.momentum + g;
            momentum[i] = m;
            direction = kind == Momentum::nesterov ? g + m * k.momentum : m;
        }
        param[i] = param[i] - direction * k.lr;
    }
}

template <class T>
TRILOOM_INLINE void lion_body(T* __restrict param, const T* __restrict grad, T* __restrict exp_avg, int64_t n,
                              const LionOf<T>& c) {
    const LionOf<T> k = c;
    for (int64_t i = 0; i < n; ++i) {
        const T g = grad[i] * k.grad_scale;
        const T m = exp_avg[i];
        const T u = m * k.beta1 + g * k.one_minus_beta1;
        const T sign = u > T(0) ? T(1) : u < T(0) ? T(-1) : T(0);
        param[i] = param[i] * k.decay - sign * k.lr;
        exp_avg[i] = m * k.beta2 + g * k.one_minus_beta2;
    }
}

}  // namespace

// The loader picks clones by symbol, so each instance is a plain function.
#define TRILOOM_SGD(NAME, T, KIND)                                                           \
    TRILOOM_CLONES void NAME(T* param, const T* grad, T* m, int64_t n, const Sgd<T>& c) {    \
        sgd_body<Momentum::KIND>(param, grad, m, n, c);                                      \
    }
TRILOOM_SGD(sgd_none, float, none)
TRILOOM_SGD(sgd_none, double, none)
TRILOOM_SGD(sgd_plain, float, plain)
TRILOOM_SGD(sgd_plain, double, plain)
TRILOOM_SGD(sgd_nesterov, float, nesterov)
TRILOOM_SGD(sgd_nesterov, double, nesterov)

TRILOOM_CLONES void lion_kernel(float* param, const float* grad, float* m, int64_t n, const LionOf<float>& c) {
    lion_body(param, grad, m, n, c);
}
TRILOOM_CLONES void lion_kernel(double* param, const double* grad, double* m, int64_t n, const LionOf<double>& c) {
    lion_body(param, grad, m, n, c);
}

namespace {

template <class T>
void run_sgd(const Piece& p, void* momentum, bool nesterov, const SgdNumbers& x, Pool* pool) {
    const Sgd<T> c{static_cast<T>(x.grad_scale), static_cast<T>(x.weight_decay), static_cast<T>(x.momentum),
                   static_cast<T>(x.lr)};
    T* param = static_cast<T*>(p.param);
    T* m = static_cast<T*>(momentum);
    sweep<T>(p, pool, [&](int64_t i, const T* grad, int64_t count) {
        if (!m) return sgd_none(param + i, grad, nullptr, count, c);
        return nesterov ? sgd_nesterov(param + i, grad, m + i, count, c) : sgd_plain(param + i, grad, m + i, count, c);
    });
}

template <class T>
void run_lion(const Piece& p, void* exp_avg, const LionNumbers& x, Pool* pool) {
    const LionOf<T> c{static_cast<T>(x.grad_scale),      static_cast<T>(x.beta1), static_cast<T>(x.one_minus_beta1),
                      static_cast<T>(x.beta2),           static_cast<T>(x.one_minus_beta2),
                      static_cast<T>(x.decay),           static_cast<T>(x.lr)};
    T* param = static_cast<T*>(p.param);
    T* m = static_cast<T*>(exp_avg);
    sweep<T>(p, pool, [&](int64_t i, const T* grad, int64_t count) { lion_kernel(param + i, grad, m + i, count, c); });
}

}  // namespace

void sgd(const Piece& p, void* momentum, bool nesterov, const SgdNumbers& numbers, Pool* pool) {
    require_apart("sgd", p, {{"momentum", momentum, momentum ? p.n * item_size(p.own) : 0}});
    p.own == DType::f32 ? run_sgd<float>(p, momentum, nesterov, numbers, pool)
                        : run_sgd<double>(p, momentum, nesterov, numbers, pool);
}

void lion(const Piece& p, void* exp_avg, const LionNumbers& numbers, Pool* pool) {
    require_apart("lion", p, {{"exp_avg", exp_avg, p.n * item_size(p.own)}});
    require(p.n == 0 || exp_avg, "lion: a null pointer with elements to update");
    p.own == DType::f32 ? run_lion<float>(p, exp_avg, numbers, pool) : run_lion<double>(p, exp_avg, numbers, pool);
}

}  // namespace triloom
