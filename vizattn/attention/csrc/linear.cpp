// ReLU linear attention on a CPU, forward and backward: what linear_native.py calls. Tokens are worked on a few at a
// time, so that they are read once; what a head keeps of them, d x e numbers and d, stays in the first cache.
#include <algorithm>

#include "lanes.h"

// As in linear_native.py, where the tensors have their shapes. `*_step` are floats from an image, head and token to the
// next.
struct LinearTask {
    float min_sum;
    const float *query, *key, *value, *temperature, *grad;
    float *out, *context, *sums, *totals, *d_query, *d_key, *d_value, *d_temperature;
    int64_t query_step[3], key_step[3], value_step[3], out_step[3], d_query_step[3], d_key_step[3], d_value_step[3];
    int64_t grad_step[3];
    int64_t images, heads, queries, keys, channels, value_channels, lanes, threads;
};

namespace {

constexpr int64_t AT_ONCE = 64;

// What one thread works with.
struct LinearRoom {
    std::vector<float> tokens, grads, mixer, turned, sums, context;

    explicit LinearRoom(const LinearTask &t)
        : tokens(AT_ONCE * t.channels), grads(AT_ONCE * t.value_channels), mixer(t.channels * t.value_channels),
          turned(mixer.size()), sums(t.channels), context(mixer.size()) {}
};

// The sum over all vectors of `width` floats of part(first float).
template <int L, class Part> INLINE float total(int64_t width, const Part &part) {
    typename Lanes<L>::Float sum = part(0);
    for (int64_t c = L; c < width; c += L) sum += part(c);
    return Lanes<L>::total(sum);
}

// (d, e) -> (e, d), times `factor`.
INLINE void turn(const float *x, int64_t d, int64_t e, float factor, float *out) {
    for (int64_t c = 0; c < d; c++)
        for (int64_t v = 0; v < e; v++) out[v * d + c] = x[c * e + v] * factor;
}

// One head of one image.
template <int L, bool backward> INLINE void work(const LinearTask &t, int64_t image, int64_t head, LinearRoom &room) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    const int64_t d = t.channels, e = t.value_channels, unit = image * t.heads + head;
    const auto first = [&](const int64_t *step) { return image * step[0] + head * step[1]; };
    const float *query = t.query + first(t.query_step), *key = t.key + first(t.key_step);
    const float *value = t.value + first(t.value_step);
    const float temperature = t.temperature ? t.temperature[head] : 1.0f;
    // What only a backward pass needs is kept where there will be one.
    float *context = t.context ? t.context + unit * d * e : room.context.data();
    float *sums = t.sums ? t.sums + unit * d : room.sums.data(), *totals = t.totals ? t.totals + unit * t.queries : nullptr;
    float *out = t.out + first(t.out_step), *tokens = room.tokens.data(), *mixer = room.mixer.data();

    const auto positive = [](const float *x) INLINED {
        const Float part = V::load(x);
        return part < 0.0f ? Float{} : part;
    };
    const auto zero = [](int64_t, int64_t) INLINED { return Float{}; };
    const auto rows = [](const float *x, int64_t step) INLINED {
        return [x, step](int64_t n) INLINED { return x + n * step; };
    };
    const auto store = [](float *x, int64_t step) INLINED {
        return [x, step](int64_t row, int64_t c, const Float &sum) INLINED { V::store(x + row * step + c, sum); };
    };
    // To the (d, e) of `to`, `count` rows of `tokens` times those of `in`.
    const auto add_products = [&](int64_t count, const auto &in, float *to) INLINED {
        products<L>(tokens, d, 1, count, in, d, e, [&](int64_t c, int64_t v) INLINED { return V::load(to + c * e + v); },
                    store(to, e));
    };

    if (!backward) {
        std::fill(context, context + d * e, 0.0f);
        std::fill(sums, sums + d, 0.0f);
        for (int64_t n = 0; n < t.keys; n += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, t.keys - n), step = t.key_step[2];
            for (int64_t c = 0; c < d; c += L) {
                Float sum = Float{};
                for (int64_t i = 0; i < count; i++) {
                    const Float part = positive(key + (n + i) * step + c);
                    V::store(tokens + i * d + c, part);
                    sum += part;
                }
                V::store(sums + c, V::load(sums + c) + sum);
            }
            add_products(count, rows(value + n * t.value_step[2], t.value_step[2]), context);
        }
        for (int64_t i = 0; i < d * e; i++) mixer[i] = context[i] * temperature;
        for (int64_t n = 0; n < t.queries; n += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, t.queries - n);
            for (int64_t i = 0; i < count; i++) {
                const float *row = query + (n + i) * t.query_step[2];
                const float sum = total<L>(d, [&](int64_t c) INLINED { return positive(row + c) * V::load(sums + c); });
                const float share = 1.0f / (sum < t.min_sum ? t.min_sum : sum);
                for (int64_t c = 0; c < d; c += L) V::store(tokens + i * d + c, positive(row + c) * share);
                if (totals) totals[n + i] = sum;
            }
            products<L>(tokens, 1, d, d, rows(mixer, e), count, e, zero, store(out + n * t.out_step[2], t.out_step[2]));
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
        for (int64_t i = 0; i < count; i++) {
            const float *row = grad + (n + i) * t.grad_step[2], *outs = out + (n + i) * t.out_step[2];
            const bool bounded = totals[n + i] < t.min_sum;
            const float share = 1.0f / (bounded ? t.min_sum : totals[n + i]);
            for (int64_t v = 0; v < e; v += L) V::store(grads + i * e + v, V::load(row + v) * share);
            d_totals[i] = 0.0f;
            if (!bounded)
                d_totals[i] = -share * total<L>(e, [&](int64_t v) INLINED { return V::load(row + v) * V::load(outs + v); });
        }
        for (int64_t c = 0; c < d; c += L) {
            Float sum = Float{};
            for (int64_t i = 0; i < count; i++) {
                const Float part = positive(query + (n + i) * t.query_step[2] + c);
                V::store(tokens + i * d + c, part);
                sum += part * d_totals[i];
            }
            V::store(d_sums + c, V::load(d_sums + c) + sum);
        }
        products<L>(grads, 1, e, e, rows(turned, d), count, d,
                    [&](int64_t i, int64_t c) INLINED { return V::load(sums + c) * d_totals[i]; },
                    [&](int64_t i, int64_t c, const Float &x) INLINED {
                        const Float gate = V::load(tokens + i * d + c);
                        V::store(d_query + (n + i) * t.d_query_step[2] + c, gate > 0.0f ? x : Float{});
                    });
        add_products(count, rows(grads, e), mixer);
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
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < d; c += L) V::store(tokens + i * d + c, positive(key + (n + i) * t.key_step[2] + c));
        products<L>(value + n * t.value_step[2], 1, t.value_step[2], e, rows(turned, d), count, d,
                    [&](int64_t, int64_t c) INLINED { return V::load(d_sums + c); },
                    [&](int64_t i, int64_t c, const Float &x) INLINED {
                        const Float gate = V::load(tokens + i * d + c);
                        V::store(d_key + (n + i) * t.d_key_step[2] + c, gate > 0.0f ? x : Float{});
                    });
        products<L>(tokens, 1, d, d, rows(mixer, e), count, e, zero,
                    store(d_value + n * t.d_value_step[2], t.d_value_step[2]));
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
