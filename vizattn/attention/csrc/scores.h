// Scores with one token in each lane of a vector, to which the channels of other tokens are broadcast.
#pragma once

#include "lanes.h"

namespace {

// Scores (K, Q * L) of K keys from the n-th on: what start(n) has for the lanes if it is there, and products of the row
// key(n) with `by_channel` (channels, Q * L).
template <int L, int Q, int K, class Key, class Start>
INLINE void score(const float *by_channel, const Key &key, int64_t channels, const Start &start, int64_t n, float *out) {
    typedef Lanes<L> V;
    constexpr int P = parts_of(K * Q);
    typename V::Float sum[P][K][Q] = {};
    for (int k = 0; k < K; k++)
        if (const float *from = start(n + k))
            for (int q = 0; q < Q; q++) sum[0][k][q] = V::load(from + q * L);
    const float *keys[K];
    for (int k = 0; k < K; k++) keys[k] = key(n + k);
    for (int64_t first = 0; first < channels; first += P)
        for (int p = 0; p < P; p++) {
            const int64_t c = first + p;
            typename V::Float query[Q];
            for (int q = 0; q < Q; q++) query[q] = V::load(by_channel + (c * Q + q) * L);
            for (int k = 0; k < K; k++)
                for (int q = 0; q < Q; q++) sum[p][k][q] += query[q] * keys[k][c];
        }
    for (int k = 0; k < K; k++)
        for (int q = 0; q < Q; q++) {
            for (int p = 1; p < P; p++) sum[0][k][q] += sum[p][k][q];
            V::store(out + ((n + k) * Q + q) * L, sum[0][k][q]);
        }
}

// The same for `count` keys, as many at once as may be.
template <int L, int Q, class Key, class Start>
INLINE void scores(const float *by_channel, const Key &key, int64_t count, int64_t channels, const Start &start, float *out) {
    constexpr int K = rows_at_once(L);
    int64_t n = 0;
    for (; n + K <= count; n += K) score<L, Q, K>(by_channel, key, channels, start, n, out);
    for (; n < count; n++) score<L, Q, 1>(by_channel, key, channels, start, n, out);
}

// Scores that start with nothing.
INLINE const float *none(int64_t) { return nullptr; }

// Rows row(0), row(1), ... of L queries, each times its factor; 0 for none. They go to rows by lane (L, channels), and to
// columns by channel (channels, step), either if wanted.
template <int L, class Row>
INLINE void take(const Row &row, int64_t channels, const typename Lanes<L>::Float &factors, float *by_lane, float *by_channel,
                 int64_t step) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    for (int64_t c = 0; c < channels; c += L) {
        Float part[L];
        for (int l = 0; l < L; l++) {
            const float *from = row(l);
            part[l] = from ? V::load(from + c) : Float{};
        }
        if (by_lane)
            for (int l = 0; l < L; l++) V::store(by_lane + l * channels + c, part[l] * factors[l]);
        if (!by_channel) continue;
        V::turn(part);
        for (int i = 0; i < L; i++) V::store(by_channel + (c + i) * step, part[i] * factors);
    }
}

// Of `count` rows of exponentials, `step` floats apart, whose probabilities are `share` of them, and of their gradients
// times `share`: in place of these, the gradients of the scores.
template <int L>
INLINE void derive_softmax(const float *rows, float *grads, int64_t step, int64_t count, const typename Lanes<L>::Float &share) {
    typedef Lanes<L> V;
    constexpr int P = 4;  // parts, none of which waits for the last step of another
    typename V::Float means[P] = {}, mean;  // under the probabilities, which the softmax takes off
    const auto add = [&](int p, int64_t k) INLINED { means[p] += V::load(rows + k * step) * V::load(grads + k * step); };
    int64_t first = 0;
    for (; first + P <= count; first += P)
        for (int p = 0; p < P; p++) add(p, first + p);
    for (; first < count; first++) add(0, first);
    mean = (means[0] + means[1]) + (means[2] + means[3]);
    mean *= share;
    for (int64_t k = 0; k < count; k++)
        V::store(grads + k * step, (V::load(grads + k * step) - mean) * V::load(rows + k * step));
}

// As `softmax`, of one row whose lanes are all to be summed up.
template <int L> INLINE float softmax_of_row(float *row, int64_t width) {
    typedef Lanes<L> V;
    typename V::Float highest = V::load(row), total{};
    for (int64_t k = L; k < width; k += L) {
        const typename V::Float x = V::load(row + k);
        highest = x > highest ? x : highest;
    }
    float top = highest[0], sum = 0.0f;
    for (int l = 1; l < L; l++) top = std::max(top, highest[l]);
    for (int64_t k = 0; k < width; k += L) {
        typename V::Float x = V::load(row + k) - top;
        V::exp(x);
        V::store(row + k, x);
        total += x;
    }
    for (int l = 0; l < L; l++) sum += total[l];
    return 1.0f / sum;
}

// As `derive_softmax`, likewise.
template <int L> INLINE void derive_softmax_of_row(const float *row, float *grads, int64_t width, float share) {
    typedef Lanes<L> V;
    typename V::Float means{};
    float mean = 0.0f;
    for (int64_t k = 0; k < width; k += L) means += V::load(row + k) * V::load(grads + k);
    for (int l = 0; l < L; l++) mean += means[l];
    mean *= share;
    for (int64_t k = 0; k < width; k += L) V::store(grads + k, (V::load(grads + k) - mean) * V::load(row + k));
}

}  // namespace
