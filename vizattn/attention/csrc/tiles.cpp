// Softmax attention of tiles of queries to gathered keys on a CPU, forward and backward: what tiles_native.py calls.
//
// Scores have one query in each lane of a vector, to which the channels of a key are broadcast. Sums that have channels
// (outputs and all gradients) have these in the lanes, and a probability is broadcast. What a tile needs stays in the
// first cache; keys and values are read where they lie, and nothing is written but results.
#include <cmath>

#include "lanes.h"

// As in tiles_native.py, where the tensors have their shapes. `*_step` are floats from an image, token and head to the next.
struct Task {
    float scale;
    const float *query, *key, *value, *bias, *grad;
    float *out, *d_query, *d_key, *d_value, *d_bias;
    const int32_t *query_at, *key_at, *mask_at;
    int64_t query_step[3], key_step[3], value_step[3], out_step[3], d_query_step[3], d_key_step[3], d_value_step[3];
    int64_t images, heads, channels, tiles, queries, keys, bias_heads, key_at_step, lanes, threads;
};

namespace {

constexpr float LOG2_E = 1.4426950408889634f;

// Scores (K, L) of K keys: what `start` (K, step) has, by e's logarithm, and products with `by_channel` (channels, L).
template <int L, int K>
INLINE void score(const float *by_channel, const float *const *keys, int64_t channels, const float *start, int64_t step,
                  float *out) {
    typedef Lanes<L> V;
    typename V::Float sum[K];
    for (int k = 0; k < K; k++) {
        sum[k] = typename V::Float{};
        if (start) sum[k] = V::load(start + k * step) * LOG2_E;
    }
    for (int64_t c = 0; c < channels; c++) {
        const typename V::Float query = V::load(by_channel + c * L);
        for (int k = 0; k < K; k++) sum[k] += query * keys[k][c];
    }
    for (int k = 0; k < K; k++) V::store(out + k * L, sum[k]);
}

template <int L, int K>
INLINE void scores(const float *by_channel, const float *const *keys, int64_t count, int64_t channels,
                   const float *start, int64_t step, float *out) {
    int64_t k = 0;
    for (; k + K <= count; k += K, start = start ? start + K * step : nullptr)
        score<L, K>(by_channel, keys + k, channels, start, step, out + k * L);
    for (; k < count; k++, start = start ? start + step : nullptr)
        score<L, 1>(by_channel, keys + k, channels, start, step, out + k * L);
}

// Rows of L queries, each times its factor: by lane (L, channels), by channel (channels, L), either if wanted; 0 for none.
template <int L>
INLINE void take(const float *rows, int64_t step, const int32_t *at, int64_t channels,
                 const typename Lanes<L>::Float &factors, float *by_lane, float *by_channel) {
    for (int l = 0; l < L; l++) {
        const float *row = rows + at[l] * step;
        if (by_lane)
            for (int64_t c = 0; c < channels; c++) by_lane[l * channels + c] = at[l] < 0 ? 0.0f : row[c] * factors[l];
        if (by_channel)
            for (int64_t c = 0; c < channels; c++) by_channel[c * L + l] = at[l] < 0 ? 0.0f : row[c] * factors[l];
    }
}

// What one thread works with.
struct Room {
    std::vector<float> floats;
    std::vector<const float *> keys, values;
    std::vector<float *> d_keys, d_values;

    explicit Room(const Task &t)
        : floats(MOST_LANES * (2 * t.keys + 4 * t.channels + 1)), keys(t.keys), values(t.keys), d_keys(t.keys),
          d_values(t.keys) {}

    float *aligned() {
        const uintptr_t bytes = sizeof(float) * MOST_LANES;
        return floats.data() + (-reinterpret_cast<uintptr_t>(floats.data()) % bytes) / sizeof(float);
    }
};

// One head of one image.
template <int L, bool backward> INLINE void work(const Task &t, int64_t image, int64_t head, Room &room) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    const int64_t d = t.channels, entries = t.keys * t.queries;
    const auto first = [&](const int64_t *step) { return image * step[0] + head * step[2]; };
    const float *query = t.query + first(t.query_step), *key = t.key + first(t.key_step);
    const float *value = t.value + first(t.value_step);
    const int64_t out_first = first(t.out_step), d_query_first = first(t.d_query_step);
    const int64_t d_key_first = first(t.d_key_step), d_value_first = first(t.d_value_step);
    const int64_t bias_first = t.bias_heads > 1 ? head * entries : 0;
    float *p = room.aligned(), *ds = p + L * t.keys;
    float *query_by_channel = ds + L * t.keys, *query_by_lane = query_by_channel + L * d;
    float *grad_by_channel = query_by_lane + L * d, *grad_by_lane = grad_by_channel + L * d;
    const float *const *keys = room.keys.data(), *const *values = room.values.data();
    const auto row_of = [](const float *const *rows) INLINED {
        return [rows](int64_t k) INLINED { return rows[k]; };
    };
    const auto zero = [](int64_t, int64_t) INLINED { return Float{}; };

    for (int64_t tile = 0; tile < t.tiles; tile++) {
        const int32_t *key_at = t.key_at + image * t.key_at_step + tile * t.keys;
        int64_t count = 0;
        for (int64_t k = 0; k < t.keys; k++) {
            if (key_at[k] < 0) continue;
            room.keys[count] = key + key_at[k] * t.key_step[1];
            room.values[count] = value + key_at[k] * t.value_step[1];
            if (backward) {
                room.d_keys[count] = t.d_key + d_key_first + key_at[k] * t.d_key_step[1];
                room.d_values[count] = t.d_value + d_value_first + key_at[k] * t.d_value_step[1];
            }
            count++;
        }
        const int64_t mask = bias_first + (t.mask_at ? t.mask_at[tile] : 0) * t.bias_heads * entries;
        for (int64_t lane = 0; lane < t.queries; lane += L) {
            const int32_t *at = t.query_at + tile * t.queries + lane;
            const float *start = t.bias ? t.bias + mask + lane : nullptr;
            take<L>(query, t.query_step[1], at, d, Float{} + t.scale * LOG2_E, nullptr, query_by_channel);
            scores<L, 8>(query_by_channel, keys, count, d, start, t.queries, p);
            Float top = V::load(p), total = Float{};
            for (int64_t k = 1; k < count; k++) {
                const Float x = V::load(p + k * L);
                top = x > top ? x : top;
            }
            for (int64_t k = 0; k < count; k++) {
                Float x = V::load(p + k * L) - top;
                V::exp2(x);
                V::store(p + k * L, x);
                total += x;
            }
            const Float share = 1.0f / total;
            if (!backward) {
                products<L>(p, L, 1, count, row_of(values), L, d, zero, [&](int64_t l, int64_t c, const Float &x) INLINED {
                    if (at[l] >= 0) V::store(t.out + out_first + at[l] * t.out_step[1] + c, x * share[l]);
                });
                continue;
            }
            // The shares are given to the gradients of outputs, which are fewer than probabilities.
            take<L>(t.grad + out_first, t.out_step[1], at, d, share, grad_by_lane, grad_by_channel);
            take<L>(query, t.query_step[1], at, d, Float{} + t.scale, query_by_lane, nullptr);
            scores<L, 8>(grad_by_channel, values, count, d, nullptr, 0, ds);
            Float mean = Float{};  // of the scores' gradients under the probabilities, which the softmax takes off
            for (int64_t k = 0; k < count; k++) mean += V::load(p + k * L) * V::load(ds + k * L);
            mean *= share;
            for (int64_t k = 0; k < count; k++)
                V::store(ds + k * L, (V::load(ds + k * L) - mean) * V::load(p + k * L));
            if (t.d_bias) {
                float *to = t.d_bias + mask + lane;
                for (int64_t k = 0; k < count; k++, to += t.queries) V::store(to, V::load(to) + V::load(ds + k * L));
            }
            products<L>(ds, L, 1, count, row_of(keys), L, d, zero, [&](int64_t l, int64_t c, const Float &x) INLINED {
                if (at[l] >= 0) V::store(t.d_query + d_query_first + at[l] * t.d_query_step[1] + c, x * t.scale);
            });
            const auto send = [&](const float *weights, const float *by_lane, float *const *to) INLINED {
                products<L>(weights, 1, L, L, [&](int64_t l) INLINED { return by_lane + l * d; }, count, d,
                            [&](int64_t k, int64_t c) INLINED { return V::load(to[k] + c); },
                            [&](int64_t k, int64_t c, const Float &x) INLINED { V::store(to[k] + c, x); });
            };
            send(ds, query_by_lane, room.d_keys.data());
            send(p, grad_by_lane, room.d_values.data());
        }
    }
}

COPIES(Task, Room, work)

void run(const Task &t, void (*one)(const Task &, int64_t, int64_t, Room &)) {
    // What is added to one table of biases' gradients is added by one thread; nothing else is shared.
    const int64_t units = t.images * t.heads, of_table = t.bias_heads > 1 ? t.images : units;
    const int64_t together = t.d_bias && units ? of_table : 1;
    share(t.threads, units / together, [&] { return Room(t); }, [&](int64_t part, Room &room) {
        for (int64_t unit = part * together; unit < (part + 1) * together; unit++)
            one(t, unit % t.images, unit / t.images, room);
    });
}

}  // namespace

extern "C" {
int64_t version() { return 5; }  // of all tasks, as in native.py
void tiles_forward(const Task *task) { run(*task, chosen<false>(task->lanes)); }
void tiles_backward(const Task *task) { run(*task, chosen<true>(task->lanes)); }
}
