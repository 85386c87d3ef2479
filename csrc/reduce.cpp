#include "reduce.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "convert.h"

namespace triloom {

namespace {

constexpr int64_t kGrain = 1 << 15;
constexpr int64_t kBlock = 2048;  // elements reduced at a time, in cache
constexpr int64_t kHalf = kSumBlock / 2;

template <class T>
TRILOOM_INLINE double square(T x) {
    const double wide = static_cast<double>(widen(x));
    return wide * wide;
}

template <class T>
TRILOOM_INLINE double block_body(const T* __restrict x, int64_t n, double* __restrict t) {
    const int64_t low = n < kHalf ? n : kHalf;
    const int64_t both = n > kHalf ? n - kHalf : 0;
    for (int64_t i = 0; i < both; ++i) t[i] = square(x[i]) + square(x[i + kHalf]);
    for (int64_t i = both; i < low; ++i) t[i] = square(x[i]);
    for (int64_t i = low; i < kHalf; ++i) t[i] = 0.0;
    for (int64_t half = kHalf / 2; half > 0; half /= 2) {
        // The halves do not overlap, which the compiler cannot know of one array.
        const double* __restrict upper = t + half;
        for (int64_t i = 0; i < half; ++i) t[i] = t[i] + upper[i];
    }
    return t[0];
}

TRILOOM_INLINE bool finite_body(const double* __restrict x, int64_t n) {
    uint64_t bad = 0;
    for (int64_t i = 0; i < n; ++i)
        bad |= static_cast<uint64_t>((bit_cast<uint64_t>(x[i]) & 0x7ff0000000000000u) == 0x7ff0000000000000u);
    return bad == 0;
}

template <class T>
TRILOOM_INLINE T combine(T a, T b, ReduceOp op) {
    switch (op) {
        case ReduceOp::sum: return a + b;
        case ReduceOp::max: return (a > b || a != a) ? a : b;
        default: return (a < b || a != a) ? a : b;
    }
}

template <>
TRILOOM_INLINE int64_t combine(int64_t a, int64_t b, ReduceOp op) {
    switch (op) {
        case ReduceOp::sum: return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
        case ReduceOp::max: return a > b ? a : b;
        default: return a < b ? a : b;
    }
}

template <ReduceOp op, class T>
TRILOOM_INLINE void combine_loop(compute_t<T>* __restrict acc, const T* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) acc[i] = combine<compute_t<T>>(acc[i], widen(x[i]), op);
}

template <class T>
TRILOOM_INLINE void combine_body(compute_t<T>* acc, const T* x, int64_t n, ReduceOp op) {
    switch (op) {
        case ReduceOp::sum: return combine_loop<ReduceOp::sum>(acc, x, n);
        case ReduceOp::max: return combine_loop<ReduceOp::max>(acc, x, n);
        case ReduceOp::min: return combine_loop<ReduceOp::min>(acc, x, n);
    }
}

// Two inputs, the commonest case, in one pass. Where out is one of them, each element is read before it is written.
template <ReduceOp op, class T>
TRILOOM_INLINE void pair_loop(T* out, const T* a, const T* b, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(combine<compute_t<T>>(widen(a[i]), widen(b[i]), op));
}

template <class T>
TRILOOM_INLINE void pair_body(T* out, const T* a, const T* b, int64_t n, ReduceOp op) {
    switch (op) {
        case ReduceOp::sum: return pair_loop<ReduceOp::sum>(out, a, b, n);
        case ReduceOp::max: return pair_loop<ReduceOp::max>(out, a, b, n);
        case ReduceOp::min: return pair_loop<ReduceOp::min>(out, a, b, n);
    }
}

}  // namespace

TRILOOM_CLONES double block_squares(const float* x, int64_t n, double* t) { return block_body(x, n, t); }
TRILOOM_CLONES double block_squares(const double* x, int64_t n, double* t) { return block_body(x, n, t); }
TRILOOM_CLONES double block_squares(const bf16* x, int64_t n, double* t) { return block_body(x, n, t); }
TRILOOM_CLONES double block_squares(const f16* x, int64_t n, double* t) { return block_body(x, n, t); }
TRILOOM_CLONES bool all_finite(const double* x, int64_t n) { return finite_body(x, n); }

TRILOOM_CLONES void combine_into(float* acc, const float* x, int64_t n, ReduceOp op) { combine_body(acc, x, n, op); }
TRILOOM_CLONES void combine_into(double* acc, const double* x, int64_t n, ReduceOp op) { combine_body(acc, x, n, op); }
TRILOOM_CLONES void combine_into(float* acc, const bf16* x, int64_t n, ReduceOp op) { combine_body(acc, x, n, op); }
TRILOOM_CLONES void combine_into(float* acc, const f16* x, int64_t n, ReduceOp op) { combine_body(acc, x, n, op); }
TRILOOM_CLONES void combine_into(int64_t* acc, const int64_t* x, int64_t n, ReduceOp op) { combine_body(acc, x, n, op); }

#define TRILOOM_PAIR(T) \
    TRILOOM_CLONES void reduce_pair(T* out, const T* a, const T* b, int64_t n, ReduceOp op) { pair_body(out, a, b, n, op); }
TRILOOM_PAIR(float)
TRILOOM_PAIR(double)
TRILOOM_PAIR(bf16)
TRILOOM_PAIR(f16)
TRILOOM_PAIR(int64_t)
#undef TRILOOM_PAIR

namespace {

template <class T>
bool partials_of(const void* data, int64_t n, double* partials, Pool* pool) {
    const T* x = static_cast<const T*>(data);
    const int64_t blocks = (n + kSumBlock - 1) / kSumBlock;
    std::atomic<bool> finite{true};
    parallel_for(pool, blocks, kGrain / kSumBlock, [&](int64_t begin, int64_t end) {
        double terms[kHalf];
        for (int64_t b = begin; b < end; ++b) {
            const T* first = x + b * kSumBlock;
            const int64_t count = std::min(kSumBlock, n - b * kSumBlock);
            partials[b] = block_squares(first, count, terms);
            if (std::isfinite(partials[b])) continue;
            // Only squares of doubles can overflow; every narrower type has told already.
            if constexpr (std::is_same_v<T, double>) {
                if (all_finite(first, count)) continue;
            }
            finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite.load();
}

template <class T>
void reduce_of(void* out, const std::vector<const void*>& inputs, DType dtype, int64_t n, ReduceOp op, Pool* pool) {
    parallel_for(pool, n, kGrain, [&](int64_t begin, int64_t end) {
        using A = compute_t<T>;
        if (inputs.size() == 2)
            return reduce_pair(static_cast<T*>(out) + begin, static_cast<const T*>(inputs[0]) + begin,
                               static_cast<const T*>(inputs[1]) + begin, end - begin, op);
        A acc[kBlock];
        for (int64_t i = begin; i < end; i += kBlock) {
            const int64_t count = std::min(kBlock, end - i);
            if constexpr (std::is_same_v<A, T>)
                std::memcpy(acc, static_cast<const T*>(inputs[0]) + i, static_cast<size_t>(count) * sizeof(T));
            else
                load(acc, static_cast<const T*>(inputs[0]) + i, dtype, count);
            for (size_t r = 1; r < inputs.size(); ++r)
                combine_into(acc, static_cast<const T*>(inputs[r]) + i, count, op);
            if constexpr (std::is_same_v<A, T>)
                std::memcpy(static_cast<T*>(out) + i, acc, static_cast<size_t>(count) * sizeof(T));
            else
                store(static_cast<T*>(out) + i, dtype, acc, count);
        }
    });
}

}  // namespace

bool sum_squares_partials(const void* data, DType dtype, int64_t n, double* partials, Pool* pool) {
    require(n >= 0 && (n == 0 || (data && partials)), "sum_squares: a negative size or a null pointer");
    switch (dtype) {
        case DType::f32: return partials_of<float>(data, n, partials, pool);
        case DType::f64: return partials_of<double>(data, n, partials, pool);
        case DType::bf16: return partials_of<bf16>(data, n, partials, pool);
        case DType::f16: return partials_of<f16>(data, n, partials, pool);
        default: throw Error("sum_squares: the elements must be floating-point");
    }
}

// Knuth's two-sum: a + b == high + low exactly.
static TRILOOM_INLINE Wide two_sum(double a, double b) {
    const double high = a + b;
    const double shadow = high - a;
    return {high, (a - (high - shadow)) + (b - shadow)};
}

Wide wide_sum(const double* data, int64_t n) {
    require(n >= 0 && (n == 0 || data), "wide_sum: a negative size or a null pointer");
    constexpr int64_t kLanes = 8;
    double high[kLanes] = {}, low[kLanes] = {};
    const int64_t whole = n - n % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t k = 0; k < kLanes; ++k) {
            const Wide sum = two_sum(high[k], data[i + k]);
            high[k] = sum.high;
            low[k] = low[k] + sum.low;
        }
    Wide total{0.0, 0.0};
    const auto add = [&total](double x) {
        const Wide sum = two_sum(total.high, x);
        total = {sum.high, total.low + sum.low};
    };
    for (int64_t k = 0; k < kLanes; ++k) add(high[k]);
    for (int64_t i = whole; i < n; ++i) add(data[i]);
    for (int64_t k = 0; k < kLanes; ++k) add(low[k]);
    const Wide sum = two_sum(total.high, total.low);
    if (std::isfinite(sum.high)) return sum;
    double plain = 0.0;  // the two-sum of an infinity is NaN
    for (int64_t i = 0; i < n; ++i) plain = plain + data[i];
    return {plain, 0.0};
}

void reduce_ranks(void* out, const std::vector<const void*>& inputs, DType dtype, int64_t n, ReduceOp op, Pool* pool) {
    require(!inputs.empty(), "reduce_ranks: no inputs");
    require(n >= 0, "reduce_ranks: the number of elements is negative");
    if (n == 0) return;
    require(out && std::find(inputs.begin(), inputs.end(), nullptr) == inputs.end(), "reduce_ranks: a null pointer");
    const int64_t size = n * item_size(dtype);
    for (size_t r = 0; r < inputs.size(); ++r)
        if (inputs[r] != out && overlap(out, size, inputs[r], size))
            throw Error("reduce_ranks: out overlaps inputs[" + std::to_string(r) +
                        "] in part; it must be one of the inputs or separate from all");
    switch (dtype) {
        case DType::f32: return reduce_of<float>(out, inputs, dtype, n, op, pool);
        case DType::f64: return reduce_of<double>(out, inputs, dtype, n, op, pool);
        case DType::bf16: return reduce_of<bf16>(out, inputs, dtype, n, op, pool);
        case DType::f16: return reduce_of<f16>(out, inputs, dtype, n, op, pool);
        case DType::i64: return reduce_of<int64_t>(out, inputs, dtype, n, op, pool);
    }
}

}  // namespace triloom
