// ReLU linear attention on a CPU, forward and backward: what linear_native.py calls. Tokens are worked on a few at a
// time, so that they are read once; what a head keeps of them, d x e numbers and d, stays in the first cache.
#include <algorithm>
#include <memory>

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

constexpr int64_t AT_ONCE = 32;

// Where a thread goes on: what it will read there is fetched while it multiplies.
struct Next {
    int64_t head, n;
};

// What one thread works with; all but tokens and their gradients for each of its heads.
struct LinearRoom {
    std::unique_ptr<float[]> floats;  // nothing of it is read before it is written
    float *tokens, *mixer, *context, *turned, *sums, *grads;

    LinearRoom(const LinearTask &t, int64_t heads) {
        const int64_t size = heads * t.channels * t.value_channels, some = AT_ONCE * t.channels;
        floats.reset(new float[some + 3 * size + heads * t.channels + (t.grad ? AT_ONCE * t.value_channels : 0) + MOST_LANES]);
        tokens = aligned(floats.get()), mixer = tokens + some, context = mixer + size, turned = context + size;
        sums = turned + size, grads = sums + heads * t.channels;
    }
};

// To `out`, with room for AT_ONCE: of `count` rows the sum over all `width` channels of part(row, channel), a vector.
template <int L, class Part> INLINE void sum_rows(int64_t count, int64_t width, const Part &part, float *out) {
    typedef Lanes<L> V;
    for (int64_t first = 0; first < count; first += L)
        V::store(out + first, V::totals([&](int i) INLINED {
            const int64_t row = std::min(first + i, count - 1);
            typename V::Float sum = part(row, 0);
            for (int64_t c = L; c < width; c += L) sum += part(row, c);
            return sum;
        }));
}

// (d, e) -> (e, d), times `factor`.
INLINE void turn(const float *x, int64_t d, int64_t e, float factor, float *out) {
    for (int64_t c = 0; c < d; c++)
        for (int64_t v = 0; v < e; v++) out[v * d + c] = x[c * e + v] * factor;
}

// Some heads of one image. Tokens are read for one head after the other, as all heads of a token may lie together.
template <int L, bool backward> INLINE void work(const LinearTask &t, int64_t image, const Heads &heads, LinearRoom &room) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    const int64_t d = t.channels, e = t.value_channels, size = d * e;
    const auto at = [image](auto *x, const int64_t *step, int64_t head, int64_t n) INLINED {
        return x + image * step[0] + head * step[1] + n * step[2];
    };
    float *tokens = room.tokens;

    const auto positive = [](const float *x) INLINED {
        const Float part = V::load(x);
        return part < 0.0f ? Float{} : part;
    };
    const auto zero = [](int64_t, int64_t) INLINED { return Float{}; };
    // To the d numbers of `to`, part(row, channel), vectors of `count` rows, in parts that do not wait for each other.
    const auto add_rows = [&](int64_t count, const auto &part, float *to) INLINED {
        constexpr int P = 4;
        for (int64_t c = 0; c < d; c += L) {
            Float sum[P] = {};
            int64_t k = 0;
            for (; k + P <= count; k += P)
                for (int p = 0; p < P; p++) sum[p] += part(k + p, c);
            for (; k < count; k++) sum[0] += part(k, c);
            V::store(to + c, V::load(to + c) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
        }
    };
    const auto store = [](float *x, int64_t step) INLINED {
        return [x, step](int64_t row, int64_t c, const Float &sum) INLINED { V::store(x + row * step + c, sum); };
    };
    // To the (d, e) of `to`, `count` rows of `tokens` times those of `in`.
    const auto add_products = [&](int64_t count, const auto &in, float *to) INLINED {
        products<L>(tokens, d, 1, count, in, d, e, [&](int64_t c, int64_t v) INLINED { return V::load(to + c * e + v); },
                    store(to, e));
    };
    // Each few of `tokens` tokens, for each head: its number here and in all, the first token, how many, and whose are next.
    const auto each = [&](int64_t tokens, const auto &one) INLINED {
        for (int64_t n = 0; n < tokens; n += AT_ONCE)
            for (int64_t i = 0; i < heads.count; i++) {
                const bool last = i + 1 == heads.count;
                const Next next{heads.first + (last ? 0 : i + 1), last && n + AT_ONCE < tokens ? n + AT_ONCE : n};
                one(i, heads.first + i, n, std::min(AT_ONCE, tokens - n), next);
            }
    };
    const auto share_of = [&](const float *totals, int64_t count, float *shares) INLINED {
        for (int64_t k = 0; k < count; k++) shares[k] = 1.0f / (totals[k] < t.min_sum ? t.min_sum : totals[k]);
    };
    const auto temperature = [&](int64_t head) INLINED { return t.temperature ? t.temperature[head] : 1.0f; };
    // What only a backward pass needs is kept where there will be one.
    const int64_t unit = image * t.heads + heads.first;
    float *context = t.context ? t.context + unit * size : room.context, *mixer = room.mixer;

    if (!backward) {
        float *sums = t.sums ? t.sums + unit * d : room.sums;
        std::fill(context, context + heads.count * size, 0.0f);
        std::fill(sums, sums + heads.count * d, 0.0f);
        each(t.keys, [&](int64_t i, int64_t head, int64_t n, int64_t count, const Next &next) INLINED {
            const float *key = at(t.key, t.key_step, head, n);
            const auto part = [&](int64_t k, int64_t c) INLINED {
                const Float x = positive(key + k * t.key_step[2] + c);
                V::store(tokens + k * d + c, x);
                return x;
            };
            add_rows(count, part, sums + i * d);
            const float *value = at(t.value, t.value_step, head, n);
            const float *next_key = at(t.key, t.key_step, next.head, next.n);
            const float *next_value = at(t.value, t.value_step, next.head, next.n);
            const auto row = [&](int64_t k) INLINED {
                fetch<L, 2>(next_key + k * t.key_step[2]), fetch<L, 2>(next_value + k * t.value_step[2]);
                return value + k * t.value_step[2];
            };
            add_products(count, row, context + i * size);
        });
        for (int64_t i = 0; i < heads.count; i++)
            for (int64_t j = 0; j < size; j++) mixer[i * size + j] = context[i * size + j] * temperature(heads.first + i);
        each(t.queries, [&](int64_t i, int64_t head, int64_t n, int64_t count, const Next &next) INLINED {
            const float *query = at(t.query, t.query_step, head, n);
            const auto part = [&](int64_t k, int64_t c) INLINED {
                const Float x = positive(query + k * t.query_step[2] + c);
                V::store(tokens + k * d + c, x);
                return x * V::load(sums + i * d + c);
            };
            float found[AT_ONCE], shares[AT_ONCE];
            sum_rows<L>(count, d, part, found);
            share_of(found, count, shares);
            if (t.totals) std::copy_n(found, count, t.totals + (unit + i) * t.queries + n);
            float *out = at(t.out, t.out_step, head, n);
            const float *next_query = at(t.query, t.query_step, next.head, next.n);
            products<L>(tokens, 1, d, d, rows_of(mixer + i * size, e), count, e, zero,
                        [&](int64_t k, int64_t c, const Float &x) INLINED {
                            fetch<L, 1>(next_query + k * t.query_step[2] + c);
                            V::store(out + k * t.out_step[2] + c, x * shares[k]);
                        });
        });
        return;
    }

    float *turned = room.turned, *grads = room.grads, *d_sums = room.sums, d_totals[AT_ONCE];
    std::fill(mixer, mixer + heads.count * size, 0.0f);  // its gradient, from here on
    std::fill(d_sums, d_sums + heads.count * d, 0.0f);
    for (int64_t i = 0; i < heads.count; i++) turn(context + i * size, d, e, temperature(heads.first + i), turned + i * size);
    each(t.queries, [&](int64_t i, int64_t head, int64_t n, int64_t count, const Next &) INLINED {
        const float *query = at(t.query, t.query_step, head, n), *grad = at(t.grad, t.grad_step, head, n);
        const float *outs = at(t.out, t.out_step, head, n), *sums = t.sums + (unit + i) * d;
        float *d_query = at(t.d_query, t.d_query_step, head, n);
        const float *found = t.totals + (unit + i) * t.queries + n;
        float shares[AT_ONCE];
        share_of(found, count, shares);
        const auto part = [&](int64_t k, int64_t v) INLINED {
            const Float x = V::load(grad + k * t.grad_step[2] + v);
            V::store(grads + k * e + v, x * shares[k]);
            return x * V::load(outs + k * t.out_step[2] + v);
        };
        sum_rows<L>(count, e, part, d_totals);
        for (int64_t k = 0; k < count; k++) d_totals[k] = found[k] < t.min_sum ? 0.0f : -shares[k] * d_totals[k];
        const auto asking = [&](int64_t k, int64_t c) INLINED {
            const Float x = positive(query + k * t.query_step[2] + c);
            V::store(tokens + k * d + c, x);
            return x * d_totals[k];
        };
        add_rows(count, asking, d_sums + i * d);
        products<L>(grads, 1, e, e, rows_of(turned + i * size, d), count, d,
                    [&](int64_t k, int64_t c) INLINED { return V::load(sums + c) * d_totals[k]; },
                    [&](int64_t k, int64_t c, const Float &x) INLINED {
                        const Float gate = V::load(tokens + k * d + c);
                        V::store(d_query + k * t.d_query_step[2] + c, gate > 0.0f ? x : Float{});
                    });
        add_products(count, rows_of(grads, e), mixer + i * size);
    });
    for (int64_t i = 0; i < heads.count; i++) {
        float *d_mixer = mixer + i * size, sum = 0.0f;
        for (int64_t j = 0; t.d_temperature && j < size; j++) sum += d_mixer[j] * context[i * size + j];
        if (t.d_temperature) t.d_temperature[unit + i] = sum;
        for (int64_t j = 0; j < size; j++) d_mixer[j] *= temperature(heads.first + i);
        turn(d_mixer, d, e, 1.0f, turned + i * size);
    }
    each(t.keys, [&](int64_t i, int64_t head, int64_t n, int64_t count, const Next &) INLINED {
        const float *key = at(t.key, t.key_step, head, n);
        float *d_key = at(t.d_key, t.d_key_step, head, n);
        for (int64_t k = 0; k < count; k++)
            for (int64_t c = 0; c < d; c += L) V::store(tokens + k * d + c, positive(key + k * t.key_step[2] + c));
        products<L>(at(t.value, t.value_step, head, n), 1, t.value_step[2], e, rows_of(turned + i * size, d), count, d,
                    [&](int64_t, int64_t c) INLINED { return V::load(d_sums + i * d + c); },
                    [&](int64_t k, int64_t c, const Float &x) INLINED {
                        const Float gate = V::load(tokens + k * d + c);
                        V::store(d_key + k * t.d_key_step[2] + c, gate > 0.0f ? x : Float{});
                    });
        products<L>(tokens, 1, d, d, rows_of(mixer + i * size, e), count, e, zero,
                    store(at(t.d_value, t.d_value_step, head, n), t.d_value_step[2]));
    });
}

COPIES(LinearTask, const Heads &, LinearRoom, work)

void run(const LinearTask &t, void (*one)(const LinearTask &, int64_t, const Heads &, LinearRoom &)) {
    const int64_t most = heads_at_once(t.images, t.heads, t.threads);
    share_heads(t.images, t.heads, most, t.threads, [&] { return LinearRoom(t, most); },
                [&](int64_t image, const Heads &heads, LinearRoom &room) { one(t, image, heads, room); });
}

}  // namespace

extern "C" {
void linear_forward(const LinearTask *task) { run(*task, chosen<false>(task->lanes)); }
void linear_backward(const LinearTask *task) { run(*task, chosen<true>(task->lanes)); }
}
