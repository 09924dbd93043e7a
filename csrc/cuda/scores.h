// Competition scores of a tile's elements: made of the deltas of all rows, which are in shared memory, and handed to a
// sink, row by row.
#pragma once

#include "cuda/api.h"
#include "cuda/tile.h"
#include "fastmerge/pcb.h"

FM_NAMESPACE_BEGIN
namespace cuda {

// Elements that follow each other, read and written at once.
template <int E>
struct alignas(4 * E) Few {
    float v[E];
};

template <int E>
FM_DEVICE Few<E> all(float value) {
    Few<E> made;
    FM_UNROLL
    for (int e = 0; e < E; ++e) made.v[e] = value;
    return made;
}

// --- tiles

// Where a thread's elements lie in shared memory, which has a row of `tile` numbers for each model, some times over.
template <int E>
struct Columns {
    float* own;
    int32_t models, tile;

    FM_METHOD Few<E>& at(int which, int32_t i) const {
        return *reinterpret_cast<Few<E>*>(own + (which * models + i) * tile);
    }
};

// Puts the deltas of a tile in shared memory. A thread does a group of eight elements, from at_group on, of some of the
// models: 8 / E threads have the same group.
template <int E>
FM_DEVICE void stage(const Models& models, int threads, int64_t at_group, int64_t end, float* columns) {
    int groups = threads * E / kEach;
    float* to = columns + kEach * (thread() % groups);
    if (at_group >= end) return;
    float base[kEach], delta[kEach];
    bool subtract = models.base.data != nullptr;
    if (subtract) load8(models.base, at_group, end, base);
    FM_ROLLED
    for (int32_t i = thread() / groups; i < models.count; i += kEach / E) {
        delta8(model_of(models, i), subtract, kFloat32, at_group, end, base, delta);
        Few<4>* row = reinterpret_cast<Few<4>*>(to + i * threads * E);
        FM_UNROLL
        for (int half = 0; half < 2; ++half) {
            Few<4> four;
            FM_UNROLL
            for (int t = 0; t < 4; ++t) four.v[t] = delta[4 * half + t];
            row[half] = four;
        }
    }
}

// --- scores

// a / b. A dividend of zero takes the slow way of the division, and all of its warp waits: where many deltas are zero,
// and most shares, that would be everywhere. b is in the range unless somebody made it up.
FM_INLINE float quotient(float a, float b) {
    float size = bit_cast<float>(bit_cast<uint32_t>(b) & 0x7fffffffu);
    bool zero = size >= 0x1p-100f && size <= 0x1p+100f && a == 0.0f;
    float result = (zero ? 1.0f : a) / b;
    return zero ? a * result : result;
}

// tanh_of, of zero without the division.
FM_INLINE float tanh_or_zero(float x) {
    float result = tanh_of(x == 0.0f ? 1.0f : x);
    return x == 0.0f ? x : result;
}

FM_INLINE float scaled(float x, float low, float width) {
    return width == 0.0f ? 0.0f : quotient(x - low, width == 0.0f ? 1.0f : width);
}

// How a row is clipped.
struct alignas(16) Edge {
    float low, high, width;
};

FM_INLINE float clipped(float delta, const Edge& edge) {
    return between(bit_cast<float>(bit_cast<uint32_t>(delta) & 0x7fffffffu), edge.low, edge.high);
}

FM_DEVICE void make_edges(const PcbArgs& args, int threads, Edge* edges) {
    if (args.variant == kPcbPaper) return;
    for (int32_t i = thread(); i < args.models.count; i += threads) {
        Norm norm = norm_of(args.clip[2 * i], args.clip[2 * i + 1]);
        edges[i] = {norm.low, args.clip[2 * i + 1], norm.width};
    }
}

FM_INLINE float strength(float square, float models, float shift) { return exp_of(square * models - shift); }

// paper: what the two deltas of a pair have in common, as a number of [0, 1].
FM_INLINE float pair_norm(float x, float y, Norm norm) {
    return scaled(between(x * y, -kLargestProduct, kLargestProduct), norm.low, norm.width);
}

template <int V>
constexpr int kColumns = V == kPcbScript     ? 1
                         : V == kPcbVisionEs ? 3
                                             : 2;

// Calls sink.row(i, scores, values) for all rows in their order. The deltas are in the first columns.
template <int V, int E, class Sink>
FM_DEVICE void released_scores(const PcbArgs& args, const Edge* edges, const Columns<E>& columns, Sink& sink) {
    int32_t n = args.models.count;
    float models = static_cast<float>(n), shift = pcb_shift(n);
    Few<E> together = all<E>(-0.0f);  // to which adding the first term gives just that
    FM_ROLLED
    for (int32_t i = 0; i < n; ++i) {
        Few<E> delta = columns.at(0, i);
        if (V == kPcbScript) {
            FM_UNROLL
            for (int e = 0; e < E; ++e) together.v[e] = together.v[e] + delta.v[e];
        } else {
            Edge edge = edges[i];
            Few<E> u;
            FM_UNROLL
            for (int e = 0; e < E; ++e) {
                u.v[e] = direction(delta.v[e]) * scaled(clipped(delta.v[e], edge), edge.low, edge.width);
                together.v[e] = together.v[e] + u.v[e];
            }
            columns.at(1, i) = u;
            if (V == kPcbVisionEs) columns.at(2, i) = all<E>(-0.0f);
        }
    }
    if (V == kPcbScript) {
        FM_UNROLL
        for (int e = 0; e < E; ++e) together.v[e] = between(together.v[e], -kLargestSum, kLargestSum);
    }
    FM_ROLLED
    for (int32_t i = 0; i < n; ++i) {
        Few<E> delta = columns.at(0, i), score, value, u;
        Edge edge = edges[i];
        if (V != kPcbScript) u = columns.at(1, i);
        Few<E> inter;
        if (V == kPcbVisionEs) {
            inter = columns.at(2, i);
            FM_UNROLL
            for (int e = 0; e < E; ++e) inter.v[e] = inter.v[e] + tanh_or_zero(u.v[e] * u.v[e]);
            FM_ROLLED
            for (int32_t j = i + 1; j < n; ++j) {
                Few<E> v = columns.at(1, j), other = columns.at(2, j);
                FM_UNROLL
                for (int e = 0; e < E; ++e) {
                    float shared = tanh_or_zero(u.v[e] * v.v[e]);
                    inter.v[e] = inter.v[e] + shared;
                    other.v[e] = other.v[e] + shared;
                }
                columns.at(2, j) = other;
            }
        } else {
            FM_UNROLL
            for (int e = 0; e < E; ++e) inter.v[e] = tanh_or_zero(delta.v[e] * together.v[e]);
        }
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            float magnitude = clipped(delta.v[e], edge), square;
            if (V == kPcbScript) {
                float z = scaled(magnitude, edge.low, edge.width);
                square = z * z;
            } else {
                // The square of +-z, which is that of z, without another division. Where the delta is 0, u is 0 and z
                // may be another number, but inter is 0 and makes the score 0; and where z is NaN, so is u.
                square = u.v[e] * u.v[e];
            }
            score.v[e] = strength(square, models, shift) * inter.v[e] + 0.0f;
            value.v[e] = direction(delta.v[e]) * magnitude;
        }
        sink.row(i, score, value);
    }
}

template <int E, class Sink>
FM_DEVICE void paper_scores(const PcbArgs& args, const Columns<E>& columns, Sink& sink) {
    int32_t n = args.models.count;
    float models = static_cast<float>(n), shift = pcb_shift(n);
    for (int32_t i = 0; i < n; ++i) columns.at(1, i) = all<E>(-0.0f);
    const float* extremes = args.extremes;
    const float* mean = args.means + n;
    FM_ROLLED
    for (int32_t i = 0; i < n; ++i) {
        Few<E> delta = columns.at(0, i), inter = columns.at(1, i), score;
        Norm norm = norm_of(extremes[0], extremes[1]);
        float own_mean = args.means[i];
        FM_UNROLL
        for (int e = 0; e < E; ++e) {
            float spread = pair_norm(delta.v[e], delta.v[e], norm);
            inter.v[e] = inter.v[e] + exp_of(spread) / *mean;
            score.v[e] = strength(spread, models, shift) / own_mean;
        }
        extremes += 2;
        mean += 1;
        FM_ROLLED
        for (int32_t j = i + 1; j < n; ++j) {
            Few<E> rival = columns.at(0, j), other = columns.at(1, j);
            norm = norm_of(extremes[0], extremes[1]);
            float divisor = *mean;
            FM_UNROLL
            for (int e = 0; e < E; ++e) {
                float shared = exp_of(pair_norm(delta.v[e], rival.v[e], norm)) / divisor;
                inter.v[e] = inter.v[e] + shared;
                other.v[e] = other.v[e] + shared;
            }
            columns.at(1, j) = other;
            extremes += 2;
            mean += 1;
        }
        FM_UNROLL
        for (int e = 0; e < E; ++e) score.v[e] = score.v[e] * inter.v[e] + 0.0f;
        sink.row(i, score, delta);
    }
}

template <int V, int E, class Sink>
FM_DEVICE void scored(const PcbArgs& args, const Edge* edges, const Columns<E>& columns, Sink& sink) {
    if constexpr (V == kPcbPaper) {
        paper_scores<E>(args, columns, sink);
    } else {
        released_scores<V, E>(args, edges, columns, sink);
    }
}

}  // namespace cuda
FM_NAMESPACE_END
