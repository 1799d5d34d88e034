// Softmax attention of tiles of queries to gathered keys on a CPU, forward and backward: what tiles_native.py calls.
//
// Scores have one query in each lane of a vector, to which the channels of a key are broadcast. Sums that have channels
// (outputs and all gradients) have these in the lanes, and a probability is broadcast. What a tile of few keys needs
// stays in the first cache; keys and values are read where they lie, but for many queries, to which they are brought
// side by side. Nothing is written but results.
#include <algorithm>
#include <cmath>
#include <memory>

#include "scores.h"

// As in tiles_native.py, where the tensors have their shapes. `*_step` are floats from an image, token and head to the next.
struct Task {
    float scale;
    const float *query, *key, *value, *bias, *grad;
    float *out, *d_query, *d_key, *d_value, *d_bias;
    const int32_t *query_at, *key_at, *mask_at;
    int64_t query_step[3], key_step[3], value_step[3], out_step[3], d_query_step[3], d_key_step[3], d_value_step[3];
    int64_t images, heads, channels, tiles, queries, keys, bias_heads, key_at_step, once, lanes, threads;
};

namespace {

// Queries of a tile from which on reading far-off keys again and again takes longer than bringing them near once.
constexpr int64_t MANY = 128;

// What one thread works with.
struct Room {
    std::unique_ptr<float[]> floats, near;  // nothing of them is read before it is written
    std::vector<const float *> keys, values, biases;
    std::vector<float *> d_keys, d_values, d_biases, far_d_keys, far_d_values;

    explicit Room(const Task &t)
        : floats(new float[MOST_LANES * (t.grad ? 4 * t.keys + 8 * t.channels + 1 : 2 * t.keys + 2 * t.channels + 1)]),
          near(new float[t.queries < MANY ? 0 : MOST_LANES + (t.grad ? 4 : 2) * t.keys * t.channels]),
          keys(t.keys), values(t.keys), biases(t.keys), d_keys(t.keys), d_values(t.keys), d_biases(t.keys) {}
};

// Some heads of one image.
template <int L, bool backward> INLINE void work(const Task &t, int64_t image, const Heads &heads, Room &room) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    const int64_t d = t.channels, entries = t.keys * t.queries;
    int64_t head = heads.first;
    const auto of = [&](auto *x, const int64_t *step, int64_t n) INLINED {
        return x + image * step[0] + n * step[1] + head * step[2];
    };
    const float *const *keys = room.keys.data(), *const *values = room.values.data();
    const auto row_of = [](const float *const *rows) INLINED {
        return [rows](int64_t k) INLINED { return rows[k]; };
    };
    const auto zero = [](int64_t, int64_t) INLINED { return Float{}; };

    // `places` queries `at`, from `lane` of their tile on, in Q vectors, for the first `count` keys of the room.
    const auto attend = [&](auto vectors, const int32_t *at, int64_t places, int64_t lane, int64_t count) INLINED {
        constexpr int Q = vectors, W = Q * L;
        float *p = aligned(room.floats.get()), *query_by_channel = p + W * t.keys;  // those that follow only in a backward pass
        float *ds = query_by_channel + W * d, *query_by_lane = ds + W * t.keys;
        float *grad_by_channel = query_by_lane + W * d, *grad_by_lane = grad_by_channel + W * d;
        const auto taken = [&](const float *rows, int64_t step, int q, const Float &factors, float *by_lane,
                               float *by_channel) INLINED {
            const auto row = [&](int l) INLINED { return at[q * L + l] < 0 ? nullptr : rows + at[q * L + l] * step; };
            take<L>(row, d, factors, by_lane ? by_lane + q * L * d : nullptr,
                    by_channel ? by_channel + q * L : nullptr, W);
        };
        for (int q = 0; q < Q; q++)
            taken(of(t.query, t.query_step, 0), t.query_step[1], q, Float{} + t.scale, nullptr, query_by_channel);
        scores<L, Q>(query_by_channel, row_of(keys), count, d,
                     [&](int64_t k) INLINED { return t.bias ? room.biases[k] + lane : nullptr; }, p);
        Float share[Q];
        for (int q = 0; q < Q; q++) share[q] = softmax<L>(p + q * L, W, count);
        if (!backward) {
            float shares[W];
            for (int q = 0; q < Q; q++) V::store(shares + q * L, share[q]);
            products<L>(p, W, 1, count, row_of(values), places, d, zero, [&](int64_t l, int64_t c, const Float &x) INLINED {
                if (at[l] >= 0) V::store(of(t.out, t.out_step, at[l]) + c, x * shares[l]);
            });
            return;
        }
        // The shares are given to the gradients of outputs, which are fewer than probabilities.
        for (int q = 0; q < Q; q++) {
            taken(of(t.grad, t.out_step, 0), t.out_step[1], q, share[q], grad_by_lane, grad_by_channel);
            taken(of(t.query, t.query_step, 0), t.query_step[1], q, Float{} + t.scale, query_by_lane, nullptr);
        }
        scores<L, Q>(grad_by_channel, row_of(values), count, d, none, ds);
        for (int q = 0; q < Q; q++) derive_softmax<L>(p + q * L, ds + q * L, W, count, share[q]);
        for (int64_t k = 0; t.d_bias && k < count; k++)
            for (int q = 0; q < Q; q++) {
                float *to = room.d_biases[k] + lane + q * L;
                V::store(to, V::load(to) + V::load(ds + k * W + q * L));
            }
        products<L>(ds, W, 1, count, row_of(keys), places, d, zero, [&](int64_t l, int64_t c, const Float &x) INLINED {
            if (at[l] >= 0) V::store(of(t.d_query, t.d_query_step, at[l]) + c, x * t.scale);
        });
        const auto send = [&](const float *weights, const float *by_lane, float *const *to) INLINED {
            products<L>(weights, 1, W, places, [&](int64_t l) INLINED { return by_lane + l * d; }, count, d,
                        [&](int64_t k, int64_t c) INLINED { return V::load(to[k] + c); },
                        [&](int64_t k, int64_t c, const Float &x) INLINED { V::store(to[k] + c, x); });
        };
        send(ds, query_by_lane, room.d_keys.data());
        send(p, grad_by_lane, room.d_values.data());
    };

    // The same of one query, in `lane` of its tile, with a key in each lane: of a vector of queries, the others would be empty.
    const auto attend_one = [&](int32_t at, int64_t lane, int64_t count) INLINED {
        float *p = aligned(room.floats.get()), *ds = p + MOST_LANES * t.keys, *query = ds + MOST_LANES * t.keys, *grad = query + d;
        const int64_t padded = (count + L - 1) / L * L;
        const auto times = [&](const float *row, const float *const *rows, float *to) INLINED {
            for (int64_t k = 0; k < padded; k += L)
                V::store(to + k, V::totals([&](int i) INLINED {
                    const float *other = rows[std::min(k + i, count - 1)];
                    Float sum = V::load(row) * V::load(other);
                    for (int64_t c = L; c < d; c += L) sum += V::load(row + c) * V::load(other + c);
                    return sum;
                }));
        };
        const auto scaled = [&](const float *row, float factor, float *to) INLINED {
            for (int64_t c = 0; c < d; c += L) V::store(to + c, V::load(row + c) * factor);
        };
        const auto weigh = [&](const float *weights, const float *const *rows, float factor, float *to) INLINED {
            products<L>(weights, 1, 0, count, row_of(rows), 1, d, zero,
                        [&](int64_t, int64_t c, const Float &x) INLINED { V::store(to + c, x * factor); });
        };
        const auto send = [&](const float *weights, const float *row, float *const *to) INLINED {
            for (int64_t k = 0; k < count; k++)
                for (int64_t c = 0; c < d; c += L) V::store(to[k] + c, V::load(to[k] + c) + V::load(row + c) * weights[k]);
        };
        scaled(of(t.query, t.query_step, at), t.scale, query);
        times(query, keys, p);
        for (int64_t k = 0; t.bias && k < count; k++) p[k] += room.biases[k][lane];
        std::fill(p + count, p + padded, -INFINITY);
        const float share = softmax_of_row<L>(p, padded);
        if (!backward) return weigh(p, values, share, of(t.out, t.out_step, at));
        scaled(of(t.grad, t.out_step, at), share, grad);
        times(grad, values, ds);
        derive_softmax_of_row<L>(p, ds, padded, share);
        for (int64_t k = 0; t.d_bias && k < count; k++) room.d_biases[k][lane] += ds[k];
        weigh(ds, keys, t.scale, of(t.d_query, t.d_query_step, at));
        send(ds, query, room.d_keys.data());
        send(p, grad, room.d_values.data());
    };

    const auto copy = [&](const float *from, float *to) INLINED {
        for (int64_t c = 0; c < d; c += L) V::store(to + c, V::load(from + c));
    };
    const auto add = [&](const float *from, float *to) INLINED {
        for (int64_t c = 0; c < d; c += L) V::store(to + c, V::load(to + c) + V::load(from + c));
    };

    // The rows of the room are brought side by side, and gradients to zeros there.
    const auto bring = [&](int64_t count) INLINED {
        float *near = aligned(room.near.get());
        for (auto *rows : {&room.keys, &room.values})
            for (int64_t k = 0; k < count; k++, near += d) {
                copy((*rows)[k], near);
                (*rows)[k] = near;
            }
        if (!backward) return;
        room.far_d_keys = room.d_keys, room.far_d_values = room.d_values;
        std::fill(near, near + 2 * count * d, 0.0f);
        for (auto *rows : {&room.d_keys, &room.d_values})
            for (int64_t k = 0; k < count; k++, near += d) (*rows)[k] = near;
    };
    const auto send_back = [&](int64_t count) INLINED {
        for (int64_t k = 0; k < count; k++) {
            if (t.once) copy(room.d_keys[k], room.far_d_keys[k]), copy(room.d_values[k], room.far_d_values[k]);
            else add(room.d_keys[k], room.far_d_keys[k]), add(room.d_values[k], room.far_d_values[k]);
        }
    };

    const auto tiled = [&](int64_t tile) INLINED {
        const int32_t *key_at = t.key_at + image * t.key_at_step + tile * t.keys, *query_at = t.query_at + tile * t.queries;
        const int64_t table = (t.mask_at ? t.mask_at[tile] : 0) * t.bias_heads + (t.bias_heads > 1 ? head : 0);
        int64_t count = 0;
        for (int64_t k = 0; k < t.keys; k++) {
            if (key_at[k] < 0) continue;
            room.keys[count] = of(t.key, t.key_step, key_at[k]);
            room.values[count] = of(t.value, t.value_step, key_at[k]);
            if (t.bias) room.biases[count] = t.bias + table * entries + k * t.queries;
            if (t.d_bias) room.d_biases[count] = t.d_bias + table * entries + k * t.queries;
            if (backward) {
                room.d_keys[count] = of(t.d_key, t.d_key_step, key_at[k]);
                room.d_values[count] = of(t.d_value, t.d_value_step, key_at[k]);
            }
            count++;
        }
        const bool many = t.queries >= MANY;
        if (many) bring(count);
        else for (int64_t k = 0; backward && t.once && k < count; k++) {
            std::fill(room.d_keys[k], room.d_keys[k] + d, 0.0f);
            std::fill(room.d_values[k], room.d_values[k] + d, 0.0f);
        }
        for (int64_t lane = 0; lane < t.queries; lane += 2 * L) {
            const int32_t *at = query_at + lane;
            int64_t places = std::min<int64_t>(2 * L, t.queries - lane);
            while (places > 0 && at[places - 1] < 0) places--;
            const bool one = places % L == 1;
            if (places - one > L) attend(std::integral_constant<int, 2>(), at, places - one, lane, count);
            else if (places - one > 0) attend(std::integral_constant<int, 1>(), at, places - one, lane, count);
            if (one) attend_one(at[places - 1], lane + places - 1, count);
        }
        if (backward && many) send_back(count);
    };
    for (int64_t tile = 0; tile < t.tiles; tile++)
        for (head = heads.first; head < heads.first + heads.count; head++) tiled(tile);
}

COPIES(Task, const Heads &, Room, work)

void run(const Task &t, void (*one)(const Task &, int64_t, const Heads &, Room &)) {
    const auto make = [&] { return Room(t); };
    if (!t.d_bias)
        return share_heads(t.images, t.heads, heads_at_once(t.images, t.heads, t.threads), t.threads, make,
                           [&](int64_t image, const Heads &heads, Room &room) { one(t, image, heads, room); });
    // What is added to one table of biases' gradients is added by one thread; nothing else is shared.
    const int64_t together = t.bias_heads > 1 ? heads_at_once(1, t.heads, t.threads) : t.heads;
    share_heads(1, t.heads, together, t.threads, make, [&](int64_t, const Heads &heads, Room &room) {
        for (int64_t image = 0; image < t.images; image++) one(t, image, heads, room);
    });
}

}  // namespace

extern "C" {
int64_t version() { return 9; }  // of all tasks, as in compiled.py
void tiles_forward(const Task *task) { run(*task, chosen<false>(task->lanes)); }
void tiles_backward(const Task *task) { run(*task, chosen<true>(task->lanes)); }
}
