// Vectors of L floats, by the compiler's vector types: the same source for the processors' different widths.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda
#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

namespace {

constexpr int MOST_LANES = 16;
constexpr float LOG2_E = 1.4426950408889634f;

// Rows of a product at once, two vectors each: those for whose sums a processor has registers.
#if defined(__x86_64__)
constexpr int rows_at_once(int lanes) { return lanes == 16 ? 8 : 4; }
#else
constexpr int rows_at_once(int) { return 8; }
#endif

// From `x` on, the first float that a vector may begin with.
inline float *aligned(float *x) {
    const uintptr_t bytes = sizeof(float) * MOST_LANES;
    return x + (-reinterpret_cast<uintptr_t>(x) % bytes) / sizeof(float);
}

// Let Q vectors from `x` on come near, if they are there.
template <int L, int Q> INLINE void fetch(const float *x) {
    for (int q = 0; q < Q; q++) __builtin_prefetch(x + q * L, 0, 2);
}

template <int L> struct Lanes {
    typedef float Float __attribute__((vector_size(4 * L)));
    typedef int32_t Int __attribute__((vector_size(4 * L)));
    typedef float Anywhere __attribute__((vector_size(4 * L), aligned(4), may_alias));

    static INLINE Float load(const float *from) { return *reinterpret_cast<const Anywhere *>(from); }
    static INLINE void store(float *to, const Float &x) { *reinterpret_cast<Anywhere *>(to) = x; }

    // Whether one lane of a comparison holds.
    static INLINE bool any(const Int &x) {
        int64_t pairs[L / 2], found = 0;
        std::memcpy(pairs, &x, sizeof pairs);
        for (int64_t pair : pairs) found |= pair;
        return found;
    }

    // The sums of all lanes of L vectors part(0), part(1), ..., one in each lane.
    template <class Part> static INLINE Float totals(const Part &part) {
#if __has_builtin(__builtin_shufflevector)
        return summed<L / 2>(part, 0);
#else
        float sums[L], parts[L];
        for (int i = 0; i < L; i++) {
            store(parts, part(i));
            sums[i] = 0.0f;
            for (int j = 0; j < L; j++) sums[i] += parts[j];
        }
        return load(sums);
#endif
    }

    // In place of each x, which is 88 at most, its exponential, within 5e-6 of it; 0 from about -87.7 down.
    static INLINE void exp(Float &x) {
        const Float least = Float{} - 88.03f;
        // 1.5 * 2^23 + 127: what is added to it loses its fraction, and its last bits are the exponent of a power of 2.
        const Float rounding = Float{} + 12583039.0f;
        const Float inside = least > x ? least : x;
        const Float whole = inside * LOG2_E + rounding;
        const Float f = inside * LOG2_E - (whole - rounding);
        Float y = f * 1.53458116e-4f + 1.33999312e-3f;  // as near to 2^f as a polynomial of degree 6 comes
        y = y * f + 9.61848896e-3f;
        y = y * f + 5.55032878e-2f;
        y = y * f + 2.40226469e-1f;
        y = y * f + 6.93147206e-1f;
        y = y * f + 1.0f;
        x = y * (Float)((Int)whole << 23);
    }

    // Of L rows of L floats, in place, their columns.
    static INLINE void turn(Float (&rows)[L]) {
#if __has_builtin(__builtin_shufflevector)
        turned<1>(rows);
#else
        float places[L][L];
        for (int i = 0; i < L; i++)
            for (int j = 0; j < L; j++) places[j][i] = rows[i][j];
        for (int i = 0; i < L; i++) rows[i] = load(places[i]);
#endif
    }

  private:
#if __has_builtin(__builtin_shufflevector)
    // Blocks of S, 2 * S, 4 * S, ... rows and columns change places across the diagonal.
    template <int S> static INLINE void turned(Float (&rows)[L]) {
        if constexpr (S < L) {
            for (int i = 0; i < L; i++) {
                if (i & S) continue;
                const Float a = rows[i], b = rows[i + S];
                rows[i] = mixed<S, 0>(a, b, std::make_integer_sequence<int, L>());
                rows[i + S] = mixed<S, S>(a, b, std::make_integer_sequence<int, L>());
            }
            turned<2 * S>(rows);
        }
    }

    // Of 2 * S vectors from the i-th on: a lane has a part of the sum of one, and 2 * S lanes on, another part.
    template <int S, class Part> static INLINE Float summed(const Part &part, int i) {
        if constexpr (S == 0) return part(i);
        else {
            const Float a = summed<S / 2>(part, i), b = summed<S / 2>(part, i + S);
            return mixed<S, 0>(a, b, std::make_integer_sequence<int, L>()) +
                   mixed<S, S>(a, b, std::make_integer_sequence<int, L>());
        }
    }

    template <int S, int from, int... J>
    static INLINE Float mixed(const Float &a, const Float &b, std::integer_sequence<int, J...>) {
        return __builtin_shufflevector(a, b, (J & S ? L + J - S + from : J + from)...);
    }
#endif
};

// Of `count` rows, `step` floats apart, the exponentials in place, of what is left of a lane's greatest; in each lane one
// over their sum.
template <int L> INLINE typename Lanes<L>::Float softmax(float *rows, int64_t step, int64_t count) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    constexpr int P = 4;  // parts, none of which waits for the last step of another
    Float top[P], total[P] = {};
    for (int p = 0; p < P; p++) top[p] = V::load(rows);
    const auto higher = [&](Float &than, const Float &x) INLINED { than = x > than ? x : than; };
    const auto raise = [&](int p, int64_t k) INLINED {
        Float x = V::load(rows + k * step) - top[0];
        V::exp(x);
        V::store(rows + k * step, x);
        total[p] += x;
    };
    int64_t k = 0;
    for (; k + P <= count; k += P)
        for (int p = 0; p < P; p++) higher(top[p], V::load(rows + (k + p) * step));
    for (; k < count; k++) higher(top[0], V::load(rows + k * step));
    for (int p = 1; p < P; p++) higher(top[0], top[p]);
    for (k = 0; k + P <= count; k += P)
        for (int p = 0; p < P; p++) raise(p, k + p);
    for (; k < count; k++) raise(0, k);
    for (int p = 1; p < P; p++) total[0] += total[p];
    return 1.0f / total[0];
}

// For `product`: rows that are `step` floats apart.
INLINE auto rows_of(const float *first, int64_t step) {
    return [first, step](int64_t n) INLINED { return first + n * step; };
}

// Of so many sums at once, how many parts each has: a sum alone would wait for its last addition at each step.
constexpr int parts_of(int sums) { return sums >= 8 ? 1 : 8 / sums; }

// Sums of C vectors of channels, from `first` on, of K rows: over n of weights (n, K) times the row in(n). The steps are
// floats from one n, or row, to the next. A sum begins with start(row, channel) and goes to end(row, channel, sum).
template <int L, int K, int C, class In, class Start, class End>
INLINE void product(const float *weights, int64_t step_n, int64_t step_k, int64_t count, const In &in, int64_t row,
                    int64_t first, const Start &start, const End &end) {
    typedef Lanes<L> V;
    constexpr int P = parts_of(K * C);
    typename V::Float sum[P][K][C] = {};
    for (int k = 0; k < K; k++)
        for (int c = 0; c < C; c++) sum[0][k][c] = start(row + k, first + c * L);
    const auto add = [&](int p, int64_t n) INLINED {
        const float *from = in(n) + first;
        for (int c = 0; c < C; c++) {
            const typename V::Float part = V::load(from + c * L);
            for (int k = 0; k < K; k++) sum[p][k][c] += part * weights[n * step_n + (row + k) * step_k];
        }
    };
    int64_t n = 0;
    for (; n + P <= count; n += P)
        for (int p = 0; p < P; p++) add(p, n + p);
    for (; n < count; n++) add(0, n);
    for (int k = 0; k < K; k++)
        for (int c = 0; c < C; c++) {
            for (int p = 1; p < P; p++) sum[0][k][c] += sum[p][k][c];
            end(row + k, first + c * L, sum[0][k][c]);
        }
}

// The same of C vectors for `rows` rows, as many at once as may be.
template <int L, int C, class In, class Start, class End>
INLINE void products_of(const float *weights, int64_t step_n, int64_t step_k, int64_t count, const In &in, int64_t rows,
                        int64_t first, const Start &start, const End &end) {
    constexpr int K = rows_at_once(L);
    int64_t row = 0;
    for (; row + K <= rows; row += K) product<L, K, C>(weights, step_n, step_k, count, in, row, first, start, end);
    for (; row + 4 <= rows; row += 4) product<L, 4, C>(weights, step_n, step_k, count, in, row, first, start, end);
    for (; row < rows; row++) product<L, 1, C>(weights, step_n, step_k, count, in, row, first, start, end);
}

// And for all `width` channels.
template <int L, class In, class Start, class End>
INLINE void products(const float *weights, int64_t step_n, int64_t step_k, int64_t count, const In &in, int64_t rows,
                     int64_t width, const Start &start, const End &end) {
    for (int64_t first = 0; first < width; first += 2 * L) {
        if (first + 2 * L <= width) products_of<L, 2>(weights, step_n, step_k, count, in, rows, first, start, end);
        else products_of<L, 1>(weights, step_n, step_k, count, in, rows, first, start, end);
    }
}

// One copy for each width of a processor's vectors of a template `work<lanes, backward>`, and which of them to use.
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
INLINE bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#define COPIES(Task, Part, Room, work)                                                                               \
    template <bool backward> void narrow(const Task &t, int64_t i, Part h, Room &room) { work<4, backward>(t, i, h, room); } \
    template <bool backward> AVX2 void avx2(const Task &t, int64_t i, Part h, Room &room) { work<8, backward>(t, i, h, room); } \
    template <bool backward> AVX512 void avx512(const Task &t, int64_t i, Part h, Room &room) { work<16, backward>(t, i, h, room); } \
    template <bool backward> auto chosen(int64_t lanes) {                                                            \
        if (lanes >= 16 && has_avx512()) return avx512<backward>;                                                    \
        if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2<backward>;    \
        return narrow<backward>;                                                                                     \
    }
#else
#define COPIES(Task, Part, Room, work)                                                                               \
    template <bool backward> void narrow(const Task &t, int64_t i, Part h, Room &room) { work<4, backward>(t, i, h, room); } \
    template <bool backward> auto chosen(int64_t) { return narrow<backward>; }
#endif

// Where torch works with GNU's OpenMP, its threads are there, and spin for a while where others would want to work.
#if defined(__linux__)
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
#endif

// Parts 0, 1, ... of a work, by at most so many threads; `make` gives each what it works with.
template <class Make, class One> void share(int64_t threads, int64_t parts, const Make &make, const One &one) {
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        auto room = make();
        for (int64_t part = next++; part < parts; part = next++) one(part, room);
    };
    if (std::min(threads, parts) < 2) return loop();
#if defined(__linux__)
    // All of them, though some may find no part: it would end those that it has no work for.
    if (GOMP_parallel) return GOMP_parallel([](void *of) { (*static_cast<decltype(loop) *>(of))(); }, &loop, threads, 0);
#endif
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < std::min(threads, parts); i++) others.emplace_back(loop);
    } catch (const std::system_error &) {  // no more threads to be had
    }
    loop();
    for (std::thread &other : others) other.join();
}

// Heads of an image that one thread works on together: as all heads of a token often lie side by side, as many as leave
// work for all threads.
struct Heads {
    int64_t first, count;
};

inline int64_t heads_at_once(int64_t images, int64_t heads, int64_t threads) {
    int64_t best = heads, least = INT64_MAX;  // what the thread that has most to do works on
    for (int64_t most = heads; most > 0; most--) {
        const int64_t parts = images * ((heads + most - 1) / most), longest = (parts + threads - 1) / threads * most;
        if (longest < least) best = most, least = longest;
    }
    return best;
}

template <class Make, class One>
void share_heads(int64_t images, int64_t heads, int64_t most, int64_t threads, const Make &make, const One &one) {
    const int64_t parts = most ? (heads + most - 1) / most : 0;
    share(threads, images * parts, make, [&](int64_t part, auto &room) {
        const int64_t first = part % parts * most;
        one(part / parts, Heads{first, std::min(most, heads - first)}, room);
    });
}

}  // namespace
