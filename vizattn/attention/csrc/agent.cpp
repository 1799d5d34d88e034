// Agent attention on a CPU, forward and backward: what agent_native.py calls.
//
// Agents collect from all keys, and all queries read from the agents. Both have one token in each lane of a vector, few
// tokens at a time, each of which is read once; the agents, what they collect, and scores of a few tokens stay in the
// first caches.
#include <algorithm>
#include <cmath>
#include <memory>

#include "scores.h"

// As in agent_native.py, where the tensors have their shapes. `*_step` are floats from an image, head and token to the next.
struct AgentTask {
    float scale;
    const float *query, *key, *value, *agents, *key_bias, *query_bias, *grad;
    float *out, *collected, *norms, *d_query, *d_key, *d_value, *d_agents, *d_key_bias, *d_query_bias;
    int64_t query_step[3], key_step[3], value_step[3], agents_step[3], out_step[3];
    int64_t d_query_step[3], d_key_step[3], d_value_step[3], d_agents_step[3], grad_step[3];
    int64_t images, heads, queries, keys, num_agents, channels, lanes, threads;
};

namespace {

// Tokens of a head before those of the next: its agents stay in the first cache, and a token's heads are read soon.
constexpr int64_t NEAR = 128;

// What one thread works with: rows of agents for each of its heads, and what a few tokens need.
struct AgentRoom {
    std::unique_ptr<float[]> floats;
    std::vector<const float *> biases;
    int64_t used = 0;

    AgentRoom(const AgentTask &t, int64_t heads)
        : floats(new float[heads * t.num_agents * (4 * t.channels + MOST_LANES + 2) +
                           2 * MOST_LANES * (3 * t.num_agents + 3 * t.channels) + 32 * MOST_LANES]),
          biases(t.num_agents) {}

    // The next `count` floats, from where a vector may begin.
    float *take(int64_t count) {
        float *part = aligned(floats.get() + used);
        used = part + count - floats.get();
        return part;
    }
};

// Some heads of one image. Tokens are read for one head after the other, as all heads of a token may lie together.
template <int L, bool backward> INLINE void work(const AgentTask &t, int64_t image, const Heads &heads, AgentRoom &room) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    const int64_t d = t.channels, A = t.num_agents, size = A * d;
    const auto of = [image](auto *x, const int64_t *step, int64_t head) INLINED {
        return x + image * step[0] + head * step[1];
    };
    const auto zero = [](int64_t, int64_t) INLINED { return Float{}; };
    // To the agents' rows of `to`, weights (A, W) times rows of tokens.
    const auto collect = [&](const float *weights, int64_t W, int64_t places, const float *rows, int64_t step, float *to) INLINED {
        products<L>(weights, 1, W, places, rows_of(rows, step), A, d,
                    [&](int64_t a, int64_t c) INLINED { return V::load(to + a * d + c); },
                    [&](int64_t a, int64_t c, const Float &sum) INLINED { V::store(to + a * d + c, sum); });
    };
    // The agents' rows times weights (A, W), for the tokens of `to`.
    const auto spread = [&](const float *weights, int64_t W, int64_t places, const float *rows, float *to, int64_t step) INLINED {
        products<L>(weights, W, 1, A, rows_of(rows, d), places, d, zero,
                    [&](int64_t l, int64_t c, const Float &sum) INLINED { V::store(to + l * step + c, sum); });
    };
    room.used = 0;
    // For each head: agents times the scores' factors, what they collect, its gradient, and that of agents.
    float *agents = room.take(heads.count * size), *collected = room.take(heads.count * size);
    float *d_collected = room.take(heads.count * size), *d_agents = room.take(heads.count * size);
    float *totals = room.take(heads.count * A * L), *tops = room.take(heads.count * A), *shares = room.take(heads.count * A + L);
    float *p = room.take(2 * L * A), *ds = room.take(2 * L * A), *some_biases = room.take(2 * L * A);
    float *by_channel = room.take(2 * L * d), *grad_by_channel = room.take(2 * L * d), *grad_by_lane = room.take(2 * L * d);

    // A few tokens at a time, for each head: its number here and in all, the first token, how many, and their vectors.
    const auto each = [&](int64_t tokens, const auto &one) INLINED {
        for (int64_t first = 0; first < tokens; first += NEAR)
            for (int64_t i = 0; i < heads.count; i++)
                for (int64_t n = first; n < std::min(first + NEAR, tokens); n += 2 * L) {
                    const int64_t places = std::min<int64_t>(2 * L, tokens - n);
                    if (places > L) one(i, heads.first + i, n, places, std::integral_constant<int, 2>());
                    else one(i, heads.first + i, n, places, std::integral_constant<int, 1>());
                }
    };
    const auto to_channels = [&](auto vectors, const float *rows, int64_t step, int64_t places, const Float *factors,
                                 float *lanes, float *channels) INLINED {
        constexpr int Q = vectors;
        const auto all = [&](int q, const auto &row) INLINED {
            take<L>(row, d, factors ? factors[q] : Float{} + 1.0f, lanes ? lanes + q * L * d : nullptr, channels + q * L, Q * L);
        };
        for (int q = 0; q < Q; q++) {
            const float *from = rows + q * L * step;
            if ((q + 1) * L <= places) all(q, [&](int l) INLINED { return from + l * step; });
            else all(q, [&](int l) INLINED { return q * L + l < places ? from + l * step : nullptr; });
        }
    };
    // Scores (A, Q * L) of the tokens in `channels` and A rows, which begin with a bias (A, tokens) from n on if any.
    const auto score_rows = [&](auto vectors, const float *channels, const float *rows, const float *bias, int64_t tokens,
                                int64_t n, int64_t places, float *out) INLINED {
        constexpr int Q = vectors, W = Q * L;
        for (int64_t a = 0; bias && a < A; a++) {
            room.biases[a] = bias + a * tokens + n;
            fetch<L, Q>(room.biases[a] + W);  // for the next tokens: the rows of a table are far from each other
            if (places == W) continue;
            std::copy_n(room.biases[a], places, some_biases + a * W);  // no number past a table's end is read
            std::fill(some_biases + a * W + places, some_biases + (a + 1) * W, 0.0f);
            room.biases[a] = some_biases + a * W;
        }
        const auto start = [&](int64_t a) INLINED { return bias ? room.biases[a] : nullptr; };
        scores<L, Q>(channels, rows_of(rows, d), A, d, start, out);
    };
    const auto hide = [&](int64_t places, int64_t W) INLINED {  // lanes without a token
        for (int64_t a = 0; places < W && a < A; a++) std::fill(p + a * W + places, p + (a + 1) * W, -INFINITY);
    };
    const auto bias_of = [A](auto *bias, int64_t head, int64_t tokens) INLINED {
        return bias ? bias + head * A * tokens : nullptr;
    };
    const auto add_bias = [&](auto vectors, float *to, int64_t tokens, int64_t n, int64_t places) INLINED {
        constexpr int W = vectors * L;
        for (int64_t a = 0; to && a < A; a++) {
            float *row = to + a * tokens + n;
            const float *more = ds + a * W;
            fetch<L, vectors>(row + W);
            int64_t l = 0;
            if (image == 0) {  // the first of those whose sum it is
                for (; l + L <= places; l += L) V::store(row + l, V::load(more + l));
                for (; l < places; l++) row[l] = more[l];
            }
            for (; l + L <= places; l += L) V::store(row + l, V::load(row + l) + V::load(more + l));
            for (; l < places; l++) row[l] += more[l];
        }
    };

    for (int64_t i = 0; i < heads.count; i++) {
        const float *from = of(t.agents, t.agents_step, heads.first + i);
        for (int64_t a = 0; a < A; a++)
            for (int64_t c = 0; c < d; c += L)
                V::store(agents + i * size + a * d + c, V::load(from + a * t.agents_step[2] + c) * t.scale);
    }
    const int64_t unit = image * t.heads + heads.first;  // of what is kept for a backward pass

    if (!backward) {
        std::fill(collected, collected + heads.count * size, 0.0f);
        std::fill(totals, totals + heads.count * A * L, 0.0f);
        std::fill(tops, tops + heads.count * A, -3e38f);
        each(t.keys, [&](int64_t i, int64_t head, int64_t n, int64_t places, auto vectors) INLINED {
            constexpr int Q = vectors, W = Q * L;
            float *top = tops + i * A, *total = totals + i * A * L, *sum = collected + i * size;
            to_channels(vectors, of(t.key, t.key_step, head) + n * t.key_step[2], t.key_step[2], places, nullptr, nullptr, by_channel);
            score_rows(vectors, by_channel, agents + i * size, bias_of(t.key_bias, head, t.keys), t.keys, n, places, p);
            hide(places, W);
            // The exponentials are of what is left of `top`, which follows the greatest score where it must.
            Float over[Q];
            for (int q = 0; q < Q; q++) over[q] = Float{} - INFINITY;
            for (int64_t a = 0; a < A; a++)
                for (int q = 0; q < Q; q++) {
                    const Float x = V::load(p + a * W + q * L) - top[a];
                    over[q] = x > over[q] ? x : over[q];
                }
            for (int q = 1; q < Q; q++) over[0] = over[q] > over[0] ? over[q] : over[0];
            const bool late = V::any(over[0] > 14.0f);
            for (int64_t a = 0; late && a < A; a++) {
                Float highest = V::load(p + a * W);
                for (int q = 1; q < Q; q++) {
                    const Float x = V::load(p + a * W + q * L);
                    highest = x > highest ? x : highest;
                }
                float higher = top[a];
                for (int l = 0; l < L; l++) higher = std::max(higher, highest[l]);
                const float factor = std::exp(top[a] - higher);
                top[a] = higher;
                V::store(total + a * L, V::load(total + a * L) * factor);
                for (int64_t c = 0; c < d; c += L) V::store(sum + a * d + c, V::load(sum + a * d + c) * factor);
            }
            for (int64_t a = 0; a < A; a++) {
                Float part = V::load(total + a * L);
                for (int q = 0; q < Q; q++) {
                    Float x = V::load(p + a * W + q * L) - top[a];
                    V::exp(x);
                    V::store(p + a * W + q * L, x);
                    part += x;
                }
                V::store(total + a * L, part);
            }
            collect(p, W, places, of(t.value, t.value_step, head) + n * t.value_step[2], t.value_step[2], sum);
        });
        for (int64_t a = 0; a < heads.count * A; a++) {
            if (a % L == 0)
                V::store(shares + a, 1.0f / V::totals([&](int i) INLINED {
                    return V::load(totals + std::min(a + i, heads.count * A - 1) * L);
                }));
            for (int64_t c = 0; c < d; c += L) V::store(collected + a * d + c, V::load(collected + a * d + c) * shares[a]);
            if (t.norms) t.norms[(unit * A + a) * 2] = tops[a], t.norms[(unit * A + a) * 2 + 1] = shares[a];
        }
        if (t.collected) std::copy_n(collected, heads.count * size, t.collected + unit * size);
        each(t.queries, [&](int64_t i, int64_t head, int64_t n, int64_t places, auto vectors) INLINED {
            constexpr int Q = vectors, W = Q * L;
            to_channels(vectors, of(t.query, t.query_step, head) + n * t.query_step[2], t.query_step[2], places, nullptr, nullptr,
                        by_channel);
            score_rows(vectors, by_channel, agents + i * size, bias_of(t.query_bias, head, t.queries), t.queries, n, places, p);
            float share[W];
            for (int q = 0; q < Q; q++) V::store(share + q * L, softmax<L>(p + q * L, W, A));
            float *out = of(t.out, t.out_step, head) + n * t.out_step[2];
            products<L>(p, W, 1, A, rows_of(collected + i * size, d), places, d, zero,
                        [&](int64_t l, int64_t c, const Float &x) INLINED { V::store(out + l * t.out_step[2] + c, x * share[l]); });
        });
        return;
    }

    std::copy_n(t.collected + unit * size, heads.count * size, collected);
    std::fill(d_collected, d_collected + heads.count * size, 0.0f);
    std::fill(d_agents, d_agents + heads.count * size, 0.0f);
    each(t.queries, [&](int64_t i, int64_t head, int64_t n, int64_t places, auto vectors) INLINED {
        constexpr int Q = vectors, W = Q * L;
        const float *query = of(t.query, t.query_step, head) + n * t.query_step[2];
        to_channels(vectors, query, t.query_step[2], places, nullptr, nullptr, by_channel);
        score_rows(vectors, by_channel, agents + i * size, bias_of(t.query_bias, head, t.queries), t.queries, n, places, p);
        Float share[Q];
        for (int q = 0; q < Q; q++) share[q] = softmax<L>(p + q * L, W, A);
        // The shares are given to the gradients of outputs, which are fewer than probabilities.
        to_channels(vectors, of(t.grad, t.grad_step, head) + n * t.grad_step[2], t.grad_step[2], places, share, grad_by_lane,
                    grad_by_channel);
        score_rows(vectors, grad_by_channel, collected + i * size, nullptr, 0, 0, places, ds);
        for (int q = 0; q < Q; q++) derive_softmax<L>(p + q * L, ds + q * L, W, A, share[q]);
        add_bias(vectors, bias_of(t.d_query_bias, head, t.queries), t.queries, n, places);
        collect(p, W, places, grad_by_lane, d, d_collected + i * size);
        collect(ds, W, places, query, t.query_step[2], d_agents + i * size);
        spread(ds, W, places, agents + i * size, of(t.d_query, t.d_query_step, head) + n * t.d_query_step[2],
               t.d_query_step[2]);
    });
    for (int64_t a = 0; a < heads.count * A; a++) {
        Float mean = Float{};  // of the scores' gradients under the probabilities, which the softmax takes off
        for (int64_t c = 0; c < d; c += L) mean += V::load(d_collected + a * d + c) * V::load(collected + a * d + c);
        totals[a] = 0.0f;
        for (int l = 0; l < L; l++) totals[a] += mean[l];
        tops[a] = t.norms[(unit * A + a) * 2], shares[a] = t.norms[(unit * A + a) * 2 + 1];
    }
    each(t.keys, [&](int64_t i, int64_t head, int64_t n, int64_t places, auto vectors) INLINED {
        constexpr int Q = vectors, W = Q * L;
        const float *key = of(t.key, t.key_step, head) + n * t.key_step[2];
        to_channels(vectors, key, t.key_step[2], places, nullptr, nullptr, by_channel);
        score_rows(vectors, by_channel, agents + i * size, bias_of(t.key_bias, head, t.keys), t.keys, n, places, p);
        hide(places, W);
        to_channels(vectors, of(t.value, t.value_step, head) + n * t.value_step[2], t.value_step[2], places, nullptr, nullptr,
                    grad_by_channel);
        score_rows(vectors, grad_by_channel, d_collected + i * size, nullptr, 0, 0, places, ds);
        for (int64_t a = 0; a < A; a++)
            for (int q = 0; q < Q; q++) {
                Float x = V::load(p + a * W + q * L) - tops[i * A + a];
                V::exp(x);
                x *= shares[i * A + a];
                V::store(p + a * W + q * L, x);
                V::store(ds + a * W + q * L, x * (V::load(ds + a * W + q * L) - totals[i * A + a]));
            }
        add_bias(vectors, bias_of(t.d_key_bias, head, t.keys), t.keys, n, places);
        spread(p, W, places, d_collected + i * size, of(t.d_value, t.d_value_step, head) + n * t.d_value_step[2],
               t.d_value_step[2]);
        collect(ds, W, places, key, t.key_step[2], d_agents + i * size);
        spread(ds, W, places, agents + i * size, of(t.d_key, t.d_key_step, head) + n * t.d_key_step[2],
               t.d_key_step[2]);
    });
    for (int64_t i = 0; i < heads.count; i++) {
        float *to = of(t.d_agents, t.d_agents_step, heads.first + i);
        for (int64_t a = 0; a < A; a++)
            for (int64_t c = 0; c < d; c += L)
                V::store(to + a * t.d_agents_step[2] + c, V::load(d_agents + i * size + a * d + c) * t.scale);
    }
}

COPIES(AgentTask, const Heads &, AgentRoom, work)

void run(const AgentTask &t, void (*one)(const AgentTask &, int64_t, const Heads &, AgentRoom &)) {
    // What is added to one table of biases' gradients is added by one thread; nothing else is shared.
    const bool by_image = !t.d_key_bias && !t.d_query_bias;
    const int64_t most = heads_at_once(by_image ? t.images : 1, t.heads, t.threads);
    share_heads(by_image ? t.images : 1, t.heads, most, t.threads, [&] { return AgentRoom(t, most); },
                [&](int64_t image, const Heads &heads, AgentRoom &room) {
                    for (int64_t last = by_image ? image + 1 : t.images; image < last; image++) one(t, image, heads, room);
                });
}

}  // namespace

extern "C" {
void agent_forward(const AgentTask *task) { run(*task, chosen<false>(task->lanes)); }
void agent_backward(const AgentTask *task) { run(*task, chosen<true>(task->lanes)); }
}
