// ReLU linear attention on a CPU, forward and backward: what linear_native.py calls. Tokens are worked on a few at a
// time, so that they are read once; what a head keeps of them, d x e numbers and d, stays in the first cache.
#include <algorithm>

#include "lanes.h"

// As in linear_native.py, where the tensors have their shapes. `*_step` are floats from an image, token and head to the
// next.
struct LinearTask {
    const float *query, *key, *value, *temperature, *grad;
    float *out, *context, *sums, *totals, *d_query, *d_key, *d_value, *d_temperature;
    int64_t query_step[3], key_step[3], value_step[3], out_step[3], d_query_step[3], d_key_step[3], d_value_step[3];
    int64_t grad_step[3];
    int64_t images, heads, queries, keys, channels, value_channels, lanes, threads;
    float min_sum;
};

namespace {

constexpr int64_t AT_ONCE = 32;

// What one thread works with.
struct LinearRoom {
    std::vector<float> tokens, grads, mixer, turned, sums;

    explicit LinearRoom(const LinearTask &t)
        : tokens(AT_ONCE * t.channels), grads(AT_ONCE * t.value_channels), mixer(t.channels * t.value_channels),
          turned(mixer.size()), sums(t.channels) {}
};

// ReLU of `count` rows of x, to `out` (count, width).
template <int L> INLINE void positive(const float *x, int64_t step, int64_t count, int64_t width, float *out) {
    typedef Lanes<L> V;
    for (int64_t n = 0; n < count; n++)
        for (int64_t c = 0; c < width; c += L) {
            const typename V::Float part = V::load(x + n * step + c);
            V::store(out + n * width + c, part < 0.0f ? typename V::Float{} : part);
        }
}

template <int L> INLINE float dot(const float *a, const float *b, int64_t width) {
    typedef Lanes<L> V;
    typename V::Float sum = V::load(a) * V::load(b);
    for (int64_t c = L; c < width; c += L) sum += V::load(a + c) * V::load(b + c);
    return V::total(sum);
}

// (d, e) -> (e, d), times `factor`.
INLINE void turn(const float *x, int64_t d, int64_t e, float factor, float *out) {
    for (int64_t c = 0; c < d; c++)
        for (int64_t v = 0; v < e; v++) out[v * d + c] = x[c * e + v] * factor;
}

// To each row of a gradient `more` is added, times the row's number if there are any; then the ReLU's derivative.
template <int L>
INLINE void finish(float *grad, int64_t step, const float *positives, int64_t count, int64_t width, const float *more,
                   const float *numbers) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    for (int64_t n = 0; n < count; n++)
        for (int64_t c = 0; c < width; c += L) {
            const Float x = V::load(grad + n * step + c) + V::load(more + c) * (numbers ? numbers[n] : 1.0f);
            V::store(grad + n * step + c, V::load(positives + n * width + c) > 0.0f ? x : Float{});
        }
}

// One head of one image.
template <int L, bool backward> INLINE void work(const LinearTask &t, int64_t image, int64_t head, LinearRoom &room) {
    typedef Lanes<L> V;
    const int64_t d = t.channels, e = t.value_channels, unit = image * t.heads + head;
    const auto first = [&](const int64_t *step) { return image * step[0] + head * step[2]; };
    const float *query = t.query + first(t.query_step), *key = t.key + first(t.key_step);
    const float *value = t.value + first(t.value_step);
    const float temperature = t.temperature ? t.temperature[head] : 1.0f;
    float *context = t.context + unit * d * e, *sums = t.sums + unit * d, *totals = t.totals + unit * t.queries;
    float *out = t.out + first(t.out_step), *tokens = room.tokens.data(), *mixer = room.mixer.data();

    if (!backward) {
        std::fill(context, context + d * e, 0.0f);
        std::fill(sums, sums + d, 0.0f);
        for (int64_t n = 0; n < t.keys; n += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, t.keys - n);
            positive<L>(key + n * t.key_step[1], t.key_step[1], count, d, tokens);
            for (int64_t c = 0; c < d; c += L) {
                typename V::Float sum{};
                for (int64_t i = 0; i < count; i++) sum += V::load(tokens + i * d + c);
                V::store(sums + c, V::load(sums + c) + sum);
            }
            products<L, true>(tokens, d, 1, count, value + n * t.value_step[1], t.value_step[1], e, context, e, d);
        }
        for (int64_t i = 0; i < d * e; i++) mixer[i] = context[i] * temperature;
        for (int64_t n = 0; n < t.queries; n += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, t.queries - n);
            float *rows = out + n * t.out_step[1];
            positive<L>(query + n * t.query_step[1], t.query_step[1], count, d, tokens);
            products<L, false>(tokens, 1, d, d, mixer, e, e, rows, t.out_step[1], count);
            for (int64_t i = 0; i < count; i++) {
                totals[n + i] = dot<L>(tokens + i * d, sums, d);
                const float share = 1.0f / (totals[n + i] < t.min_sum ? t.min_sum : totals[n + i]);
                float *row = rows + i * t.out_step[1];
                for (int64_t c = 0; c < e; c += L) V::store(row + c, V::load(row + c) * share);
            }
        }
        return;
    }

    const float *grad = t.grad + first(t.grad_step);
    float *d_query = t.d_query + first(t.d_query_step), *d_key = t.d_key + first(t.d_key_step);
    float *d_value = t.d_value + first(t.d_value_step), *turned = room.turned.data();
    float *grads = room.grads.data(), *d_sums = room.sums.data(), d_totals[AT_ONCE];
    std::fill(mixer, mixer + d * e, 0.0f);  // its gradient, from here on
    std::fill(d_sums, d_sums + d, 0.0f);
    turn(context, d, e, temperature, turned);
    for (int64_t n = 0; n < t.queries; n += AT_ONCE) {
        const int64_t count = std::min(AT_ONCE, t.queries - n);
        positive<L>(query + n * t.query_step[1], t.query_step[1], count, d, tokens);
        for (int64_t i = 0; i < count; i++) {
            const float total = totals[n + i];
            const float *row = grad + (n + i) * t.grad_step[1];
            for (int64_t c = 0; c < e; c += L)
                V::store(grads + i * e + c, V::load(row + c) * (1.0f / (total < t.min_sum ? t.min_sum : total)));
            d_totals[i] = total < t.min_sum ? 0.0f : -dot<L>(grads + i * e, out + (n + i) * t.out_step[1], e);
        }
        for (int64_t c = 0; c < d; c += L) {
            typename V::Float sum{};
            for (int64_t i = 0; i < count; i++) sum += V::load(tokens + i * d + c) * d_totals[i];
            V::store(d_sums + c, V::load(d_sums + c) + sum);
        }
        float *rows = d_query + n * t.d_query_step[1];
        products<L, false>(grads, 1, e, e, turned, d, d, rows, t.d_query_step[1], count);
        finish<L>(rows, t.d_query_step[1], tokens, count, d, sums, d_totals);
        products<L, true>(tokens, d, 1, count, grads, e, e, mixer, e, d);
    }
    if (t.d_temperature) {
        float sum = 0.0f;
        for (int64_t i = 0; i < d * e; i++) sum += mixer[i] * context[i];
        t.d_temperature[unit] = sum;
    }
    for (int64_t i = 0; i < d * e; i++) mixer[i] *= temperature;
    turn(mixer, d, e, 1.0f, turned);
    for (int64_t n = 0; n < t.keys; n += AT_ONCE) {
        const int64_t count = std::min(AT_ONCE, t.keys - n);
        positive<L>(key + n * t.key_step[1], t.key_step[1], count, d, tokens);
        float *rows = d_key + n * t.d_key_step[1];
        products<L, false>(value + n * t.value_step[1], 1, t.value_step[1], e, turned, d, d, rows, t.d_key_step[1], count);
        finish<L>(rows, t.d_key_step[1], tokens, count, d, d_sums, nullptr);
        products<L, false>(tokens, 1, d, d, mixer, e, e, d_value + n * t.d_value_step[1], t.d_value_step[1], count);
    }
}

COPIES(LinearTask, LinearRoom, work)

void run(const LinearTask &t, void (*one)(const LinearTask &, int64_t, int64_t, LinearRoom &)) {
    share(t.threads, t.images * t.heads, [&] { return LinearRoom(t); },
          [&](int64_t part, LinearRoom &room) { one(t, part / t.heads, part % t.heads, room); });
}

}  // namespace

extern "C" {
void linear_forward(const LinearTask *task) { run(*task, chosen<false>(task->lanes)); }
void linear_backward(const LinearTask *task) { run(*task, chosen<true>(task->lanes)); }
}
