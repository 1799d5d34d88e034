// Vectors of L floats, by the compiler's vector types: the same source for the processors' different widths.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int MOST_LANES = 16;

template <int L> struct Lanes {
    typedef float Float __attribute__((vector_size(4 * L)));
    typedef int32_t Int __attribute__((vector_size(4 * L)));
    typedef float Anywhere __attribute__((vector_size(4 * L), aligned(4), may_alias));

    static INLINE Float load(const float *from) { return *reinterpret_cast<const Anywhere *>(from); }
    static INLINE void store(float *to, const Float &x) { *reinterpret_cast<Anywhere *>(to) = x; }

    // The sum of all lanes, by halves.
    static INLINE float total(const Float &x) {
        float parts[L];
        store(parts, x);
        if constexpr (L > 4) {
            typedef Lanes<L / 2> Half;
            return Half::total(Half::load(parts) + Half::load(parts + L / 2));
        } else {
            return (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
    }

    // In place of each x, 2 to its power, as near as float32 is; below the range of normal numbers 0.
    static INLINE void exp2(Float &x) {
        const Float least = Float{} - 126.0f;
        const Float rounding = Float{} + 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
        Float inside = x > least ? x : least;
        Float whole = inside + rounding;
        Float f = inside - (whole - rounding);
        Float y = f * 1.5252734e-5f + 1.5403530e-4f;  // ln(2)^n / n!
        y = y * f + 1.3333558e-3f;
        y = y * f + 9.6181291e-3f;
        y = y * f + 5.5504109e-2f;
        y = y * f + 2.4022651e-1f;
        y = y * f + 6.9314718e-1f;
        y = y * f + 1.0f;
        Float power = (Float)((Int)y + ((Int)whole << 23));
        power = x > least ? power : Float{};
        x = x == x ? power : x;
    }
};

// C vectors of K rows of `out`, those from float `first` on: sums over n of weights (n, K) times rows of `in`. The steps
// are floats from a row, or number n, to the next. What is in `out` is replaced, or added to.
template <int L, int K, int C, bool add>
INLINE void product(const float *weights, int64_t step_n, int64_t step_k, int64_t count, const float *in, int64_t in_step,
                    int64_t first, float *out, int64_t out_step) {
    typedef Lanes<L> V;
    typename V::Float sum[K][C];
    for (int k = 0; k < K; k++)
        for (int c = 0; c < C; c++) sum[k][c] = typename V::Float{};
    for (int64_t n = 0; n < count; n++) {
        for (int c = 0; c < C; c++) {
            const typename V::Float row = V::load(in + n * in_step + first + c * L);
            for (int k = 0; k < K; k++) sum[k][c] += row * weights[n * step_n + k * step_k];
        }
    }
    for (int k = 0; k < K; k++)
        for (int c = 0; c < C; c++) {
            float *to = out + k * out_step + first + c * L;
            if (add) sum[k][c] += V::load(to);
            V::store(to, sum[k][c]);
        }
}

// All `width` floats of `rows` rows: out (rows, width) = or += weights (count, rows) transposed times in (count, width).
template <int L, bool add>
INLINE void products(const float *weights, int64_t step_n, int64_t step_k, int64_t count, const float *in,
                     int64_t in_step, int64_t width, float *out, int64_t out_step, int64_t rows) {
    for (int64_t first = 0; first < width;) {
        const bool two = first + 2 * L <= width;
        int64_t k = 0;
        for (; k + 8 <= rows; k += 8) {
            const float *w = weights + k * step_k;
            float *o = out + k * out_step;
            if (two) product<L, 8, 2, add>(w, step_n, step_k, count, in, in_step, first, o, out_step);
            else product<L, 8, 1, add>(w, step_n, step_k, count, in, in_step, first, o, out_step);
        }
        for (; k < rows; k++) {
            const float *w = weights + k * step_k;
            float *o = out + k * out_step;
            if (two) product<L, 1, 2, add>(w, step_n, step_k, count, in, in_step, first, o, out_step);
            else product<L, 1, 1, add>(w, step_n, step_k, count, in, in_step, first, o, out_step);
        }
        first += two ? 2 * L : L;
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
#define COPIES(Task, Room, work)                                                                                     \
    template <bool backward> void narrow(const Task &t, int64_t i, int64_t h, Room &room) { work<4, backward>(t, i, h, room); } \
    template <bool backward> AVX2 void avx2(const Task &t, int64_t i, int64_t h, Room &room) { work<8, backward>(t, i, h, room); } \
    template <bool backward> AVX512 void avx512(const Task &t, int64_t i, int64_t h, Room &room) { work<16, backward>(t, i, h, room); } \
    template <bool backward> auto chosen(int64_t lanes) {                                                            \
        if (lanes >= 16 && has_avx512()) return avx512<backward>;                                                    \
        if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2<backward>;    \
        return narrow<backward>;                                                                                     \
    }
#else
#define COPIES(Task, Room, work)                                                                                     \
    template <bool backward> void narrow(const Task &t, int64_t i, int64_t h, Room &room) { work<4, backward>(t, i, h, room); } \
    template <bool backward> auto chosen(int64_t) { return narrow<backward>; }
#endif

// Parts 0, 1, ... of a work, by at most so many threads; `make` gives each what it works with.
template <class Make, class One> void share(int64_t threads, int64_t parts, const Make &make, const One &one) {
    std::atomic<int64_t> next{0};
    const auto loop = [&] {
        auto room = make();
        for (int64_t part = next++; part < parts; part = next++) one(part, room);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads && i < parts; i++) others.emplace_back(loop);
    } catch (const std::system_error &) {  // no more threads to be had
    }
    loop();
    for (std::thread &other : others) other.join();
}

}  // namespace
