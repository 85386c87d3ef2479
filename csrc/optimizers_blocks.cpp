// AdamW with averages in 8 bits (Dettmers et al., arXiv 2110.02861); numbers and bounds come from
// runtime/triloom/optim/blocks.py.
#include <cmath>
#include <type_traits>

#include "optimizers.h"
#include "optimizers_sweep.h"

namespace triloom {

namespace {

template <class T>
struct Block8 {
    T grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, inv_sqrt_correction, eps;
};

template <class T>
struct Arrays {
    T* param;
    const T* grad;
    uint8_t* exp_avg;
    T* exp_avg_max;
    uint8_t* root;
    T* root_max;
    const T* tables;
};

constexpr int64_t kTable = 256;

// Codes of a block: the number of bounds below value / largest magnitude. Largest magnitudes are compared as
// integers and the search goes over the whole block bit by bit, so that both loops vectorise.
template <class T>
TRILOOM_INLINE void encode(const T* __restrict x, const T* __restrict bounds, uint8_t* __restrict codes, T* largest) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    Bits top = 0;
    for (int64_t j = 0; j < kBlock; ++j) {
        const Bits b = bit_cast<Bits>(std::fabs(x[j]));
        top = b > top ? b : top;
    }
    *largest = bit_cast<T>(top);
    const T divisor = top == 0 ? T(1) : bit_cast<T>(top);
    T y[kBlock];
    int32_t code[kBlock];
    for (int64_t j = 0; j < kBlock; ++j) {
        y[j] = x[j] / divisor;
        code[j] = 0;
    }
    for (int32_t step = kTable / 2; step; step /= 2)
        for (int64_t j = 0; j < kBlock; ++j) code[j] += y[j] > bounds[code[j] + step - 1] ? step : 0;
    for (int64_t j = 0; j < kBlock; ++j) codes[j] = static_cast<uint8_t>(code[j]);
}

template <class T>
TRILOOM_INLINE void update(const Arrays<T>& a, int64_t blocks, const Block8<T>& c) {
    const Block8<T> k = c;
    const T* __restrict numbers = a.tables;
    const T* __restrict roots = a.tables + 2 * kTable;
    for (int64_t b = 0; b < blocks; ++b) {
        T* __restrict param = a.param + b * kBlock;
        const T* __restrict grad = a.grad + b * kBlock;
        uint8_t* m_codes = a.exp_avg + b * kBlock;
        uint8_t* r_codes = a.root + b * kBlock;
        const T m_max = a.exp_avg_max[b];
        const T r_max = a.root_max[b];
        T m[kBlock];
        T r[kBlock];
        for (int64_t j = 0; j < kBlock; ++j) {
            const T g = grad[j] * k.grad_scale;
            const T old = roots[r_codes[j]] * r_max;
            m[j] = (numbers[m_codes[j]] * m_max) * k.beta1 + g * k.one_minus_beta1;
            r[j] = std::sqrt((old * old) * k.beta2 + (g * k.one_minus_beta2) * g);
            param[j] = param[j] * k.decay - (m[j] * k.rate) / (r[j] * k.inv_sqrt_correction + k.eps);
        }
        encode(m, a.tables + kTable, m_codes, a.exp_avg_max + b);
        encode(r, a.tables + 3 * kTable, r_codes, a.root_max + b);
    }
}

}  // namespace

TRILOOM_CLONES void adamw8_kernel(const Arrays<float>& a, int64_t blocks, const Block8<float>& c) {
    update(a, blocks, c);
}
TRILOOM_CLONES void adamw8_kernel(const Arrays<double>& a, int64_t blocks, const Block8<double>& c) {
    update(a, blocks, c);
}

namespace {

template <class T>
void run(const Piece& p, const BlockStates& s, const AdamWNumbers& x, Pool* pool) {
    const auto r = [](double v) { return static_cast<T>(v); };
    const Block8<T> c{r(x.grad_scale),      r(x.beta1), r(x.one_minus_beta1), r(x.beta2),
                      r(x.one_minus_beta2), r(x.decay), r(x.rate),            r(x.inv_sqrt_correction),
                      r(x.eps)};
    sweep<T>(p, pool, [&](int64_t i, const T* grad, int64_t count) {
        const int64_t b = i / kBlock;
        const Arrays<T> a{static_cast<T*>(p.param) + i,       grad,       s.exp_avg + i,
                          static_cast<T*>(s.exp_avg_max) + b, s.root + i, static_cast<T*>(s.root_max) + b,
                          static_cast<const T*>(s.tables)};
        adamw8_kernel(a, count / kBlock, c);
    });
}

}  // namespace

void adamw8(const Piece& p, const BlockStates& s, const AdamWNumbers& numbers, Pool* pool) {
    const int64_t largest = p.n / kBlock * item_size(p.own);
    require_apart("adamw8", p,
                  {{"exp_avg", s.exp_avg, p.n},
                   {"exp_avg_max", s.exp_avg_max, largest},
                   {"root", s.root, p.n},
                   {"root_max", s.root_max, largest}});
    require(p.n % kBlock == 0, "adamw8: the number of elements is not a multiple of 64");
    require(p.n == 0 || (s.exp_avg && s.exp_avg_max && s.root && s.root_max && s.tables),
            "adamw8: a null pointer with elements to update");
    p.own == DType::f32 ? run<float>(p, s, numbers, pool) : run<double>(p, s, numbers, pool);
}

}  // namespace triloom
