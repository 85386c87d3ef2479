#include "philox.h"

#include <algorithm>
#include <functional>

#include "convert.h"
#include "philox_kernels.h"

namespace triloom {

namespace {

constexpr int64_t kSegment = 1024;     // elements drawn at a time, in cache
constexpr int64_t kGrain = 1 << 15;    // elements a thread takes at a time, about

bool runs_into(const Axis& outer, const Axis& inner) {
    return outer.out == inner.out * inner.size && outer.in == inner.in * inner.size &&
           outer.index == inner.index * inner.size;
}

// The same elements over as few axes as possible. Every element is independent, so axes may be put
// in the order that makes the innermost one walk consecutive indices.
std::vector<Axis> collapse(std::vector<Axis> axes) {
    axes.erase(std::remove_if(axes.begin(), axes.end(), [](const Axis& a) { return a.size == 1; }), axes.end());
    std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) {
        const auto rank = [](int64_t stride) { return static_cast<uint64_t>(stride) - 1; };  // 0 counts as largest
        return rank(a.index) > rank(b.index);
    });
    std::vector<Axis> out;
    for (const Axis& a : axes) {
        if (!out.empty() && runs_into(out.back(), a))
            out.back() = {out.back().size * a.size, a.out, a.in, a.index};
        else
            out.push_back(a);
    }
    if (out.empty()) out.push_back({1, 1, 1, 1});
    return out;
}

struct Segment {
    int64_t out, in;  // offsets of the first element
    uint64_t index;   // where it draws
    int64_t size;     // elements along the innermost axis, at most kSegment
};

// body(segment, innermost axis) over all of the box.
void for_segments(const Box& box, Pool* pool, const std::function<void(const Segment&, const Axis&)>& body) {
    for (const Axis& a : box.axes) {
        require(a.size >= 0 && a.index >= 0, "philox: sizes and index strides must not be negative");
        if (a.size == 0) return;
    }
    std::vector<Axis> outer = collapse(box.axes);
    const Axis inner = outer.back();
    outer.pop_back();
    int64_t rows = 1;
    for (const Axis& a : outer) rows *= a.size;
    const int64_t per_row = (inner.size + kSegment - 1) / kSegment;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(inner.size, kSegment));
    parallel_for(pool, rows * per_row, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % per_row * kSegment;
            Segment s{first * inner.out, first * inner.in, box.base + static_cast<uint64_t>(first * inner.index),
                      std::min(kSegment, inner.size - first)};
            int64_t row = i / per_row;
            for (auto a = outer.rbegin(); a != outer.rend(); ++a) {
                const int64_t at = row % a->size;
                row /= a->size;
                s.out += at * a->out;
                s.in += at * a->in;
                s.index += static_cast<uint64_t>(at * a->index);
            }
            body(s, inner);
        }
    });
}

// Words of one segment. Consecutive indices share counters; other strides cost a counter each.
class Words {
public:
    Words(uint64_t key, const Segment& s, int64_t stride) {
        if (stride == 1) {
            skip_ = static_cast<int64_t>(s.index % 4);
            philox_words(key, s.index / 4, counters(s), buffer_);
            return;
        }
        uint32_t quad[4];
        for (int64_t i = 0; i < s.size; ++i) {
            const uint64_t at = s.index + static_cast<uint64_t>(i * stride);
            philox_words(key, at / 4, 1, quad);
            buffer_[i] = quad[at % 4];
        }
    }
    const uint32_t* begin() const { return buffer_ + skip_; }

    static int64_t counters(const Segment& s) { return (static_cast<int64_t>(s.index % 4) + s.size + 3) / 4; }

private:
    uint32_t buffer_[kSegment + 8];
    int64_t skip_ = 0;
};

// Normals of one segment; a normal needs both words of its pair.
class Normals {
public:
    Normals(uint64_t key, const Segment& s, int64_t stride, double mean, double std) {
        if (stride == 1) {
            uint32_t words[kSegment + 8];
            const int64_t count = Words::counters(s);
            skip_ = static_cast<int64_t>(s.index % 4);
            philox_words(key, s.index / 4, count, words);
            normals(words, 4 * count, mean, std, buffer_);
            return;
        }
        uint32_t quad[4];
        double pair[2];
        for (int64_t i = 0; i < s.size; ++i) {
            const uint64_t at = s.index + static_cast<uint64_t>(i * stride);
            philox_words(key, at / 4, 1, quad);
            normals(quad + (at & 2), 2, mean, std, pair);
            buffer_[i] = pair[at & 1];
        }
    }
    const double* begin() const { return buffer_ + skip_; }

private:
    double buffer_[kSegment + 8];
    int64_t skip_ = 0;
};

// Puts doubles into a strided array: rounded to fp32 first for the 16-bit types.
void emit(void* out, DType dtype, const Segment& s, int64_t stride, const double* values) {
    const int64_t width = item_size(dtype);
    char* to = static_cast<char*>(out) + s.out * width;
    if (stride == 1) return store(to, dtype, values, s.size);
    char packed[kSegment * sizeof(double)];
    store(packed, dtype, values, s.size);
    for (int64_t i = 0; i < s.size; ++i)
        std::memcpy(to + i * stride * width, packed + i * width, static_cast<size_t>(width));
}

template <class T>
void dropout_of(void* out, const void* in, const Box& box, uint32_t threshold, double scale, Pool* pool) {
    const auto factor = static_cast<compute_t<T>>(scale);
    for_segments(box, pool, [&](const Segment& s, const Axis& inner) {
        const Words words(box.key, s, inner.index);
        const T* from = static_cast<const T*>(in) + s.in;
        T* to = static_cast<T*>(out) + s.out;
        if (inner.in == 1 && inner.out == 1) return drop(words.begin(), s.size, threshold, factor, from, to);
        for (int64_t i = 0; i < s.size; ++i)
            drop(words.begin() + i, 1, threshold, factor, from + i * inner.in, to + i * inner.out);
    });
}

}  // namespace

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    return philox_block(c, k);
}

void fill_uniform(void* out, DType dtype, const Box& box, double low, double high, Pool* pool) {
    for_segments(box, pool, [&](const Segment& s, const Axis& inner) {
        const Words words(box.key, s, inner.index);
        double values[kSegment];
        uniforms(words.begin(), s.size, low, high - low, values);
        emit(out, dtype, s, inner.out, values);
    });
}

void fill_normal(void* out, DType dtype, const Box& box, double mean, double std, Pool* pool) {
    for_segments(box, pool, [&](const Segment& s, const Axis& inner) {
        const Normals values(box.key, s, inner.index, mean, std);
        emit(out, dtype, s, inner.out, values.begin());
    });
}

void dropout(void* out, const void* in, DType dtype, const Box& box, uint32_t threshold, double scale, Pool* pool) {
    switch (dtype) {
        case DType::f32: return dropout_of<float>(out, in, box, threshold, scale, pool);
        case DType::f64: return dropout_of<double>(out, in, box, threshold, scale, pool);
        case DType::bf16: return dropout_of<bf16>(out, in, box, threshold, scale, pool);
        case DType::f16: return dropout_of<f16>(out, in, box, threshold, scale, pool);
        default: throw Error("dropout: the elements must be floating-point");
    }
}

void round_stochastic(void* out, const void* in, const Box& box, Pool* pool) {
    for_segments(box, pool, [&](const Segment& s, const Axis& inner) {
        const Words words(box.key, s, inner.index);
        const float* from = static_cast<const float*>(in) + s.in;
        bf16* to = static_cast<bf16*>(out) + s.out;
        if (inner.in == 1 && inner.out == 1) return round_randomly(words.begin(), s.size, from, to);
        for (int64_t i = 0; i < s.size; ++i)
            round_randomly(words.begin() + i, 1, from + i * inner.in, to + i * inner.out);
    });
}

}  // namespace triloom
