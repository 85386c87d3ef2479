// How a rule goes over its arrays: in pieces for the threads and, where types differ, in blocks that stay in cache.
#pragma once

#include <initializer_list>
#include <string>

#include "convert.h"
#include "optimizers.h"

namespace triloom {

// kernel(first, grad, count) updates elements [first, first + count); grad points at the first of them,
// already in T. Pieces and blocks are multiples of kBlock, except for the end.
template <class T, class Kernel>
void sweep(const Piece& p, Pool* pool, const Kernel& kernel) {
    constexpr int64_t grain = 1 << 15;
    static_assert(grain % kBlock == 0 && kConvertBlock % kBlock == 0);
    const DType own = sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;
    const bool direct = p.grad_dtype == own;
    const int64_t block = direct && !p.low ? grain : kConvertBlock;
    const char* grad = static_cast<const char*>(p.grad);
    char* low = static_cast<char*>(p.low);
    parallel_for(pool, p.n, grain, [&](int64_t begin, int64_t end) {
        T staged[kConvertBlock];
        for (int64_t i = begin; i < end; i += block) {
            const int64_t count = end - i < block ? end - i : block;
            const char* source = grad + i * item_size(p.grad_dtype);
            if (!direct) load(staged, source, p.grad_dtype, count);
            kernel(i, direct ? reinterpret_cast<const T*>(source) : staged, count);
            if (low) store(low + i * item_size(p.low_dtype), p.low_dtype, static_cast<T*>(p.param) + i, count);
        }
    });
}

struct Extent {
    const char* name;
    const void* data;
    int64_t size;  // bytes
};

// The loops assume separate arrays.
inline void require_apart(const char* rule, const Piece& p, std::initializer_list<Extent> states) {
    require(p.n >= 0, "an update's number of elements is negative");
    require(p.own == DType::f32 || p.own == DType::f64, "the parameters of an update must be f32 or f64");
    require(p.n == 0 || (p.param && p.grad), "an update has a null pointer with elements to update");
    const Extent common[] = {{"param", p.param, p.n * item_size(p.own)},
                             {"grad", p.grad, p.n * item_size(p.grad_dtype)},
                             {"low", p.low, p.low ? p.n * item_size(p.low_dtype) : 0}};
    const auto check = [&](const Extent& x, const Extent& y) {
        if (&x != &y && x.size && y.size && overlap(x.data, x.size, y.data, y.size))
            throw Error(std::string(rule) + ": " + x.name + " and " + y.name +
                        " overlap in memory; they must be separate");
    };
    for (const auto& x : common) {
        for (const auto& y : common) check(x, y);
        for (const auto& y : states) check(x, y);
    }
    for (const auto& x : states)
        for (const auto& y : states) check(x, y);
}

}  // namespace triloom
