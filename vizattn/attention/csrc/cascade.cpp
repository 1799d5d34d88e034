// Cascaded group attention in inference on a CPU: what cascade_native.py calls. A window is worked on from its channels to
// its outputs, head by head; numbers have one position in each lane of a vector, as a map has them in memory.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "lanes.h"

constexpr int MOST_HEADS = 8;

// A linear layer or depthwise convolution and its norm; without a norm or bias, these are null.
struct Layer {
    const float *weight, *bias, *gamma, *beta, *mean, *variance;
};

// As in cascade_native.py, where the tensors have their shapes.
struct CascadeTask {
    float eps;
    const float *x, *table;
    float *out;
    struct { Layer qkv, conv; } layers[MOST_HEADS];
    int64_t kernel[MOST_HEADS];
    int64_t images, heads, channels, key_channels, height, width, window_height, window_width, table_width, lanes, threads;
};

namespace {

constexpr int64_t AT_ONCE = 4;  // positions of a row in a convolution

// What a layer's sums are multiplied by and what is added to them, channel by channel.
struct Affine {
    std::vector<float> scale, shift;

    Affine(const Layer &layer, int64_t channels, float eps, float factor) : scale(channels), shift(channels) {
        for (int64_t c = 0; c < channels; c++) {
            float by = layer.variance ? 1.0f / std::sqrt(layer.variance[c] + eps) : 1.0f;
            if (layer.gamma) by *= layer.gamma[c];
            float add = layer.bias ? layer.bias[c] : 0.0f;
            if (layer.variance) add = (add - layer.mean[c]) * by;
            if (layer.beta) add += layer.beta[c];
            scale[c] = by * factor;
            shift[c] = add * factor;
        }
    }
};

// The norms of a head folded into its layers.
struct Folded {
    Affine qkv, conv;
    std::vector<float> taps;  // (kernel, kernel, channels)
};

struct Cascade {
    const CascadeTask &task;
    std::vector<Folded> folded;
    int64_t places, border, row;  // of a window's positions in lanes; of its largest convolution; of its queries with it

    explicit Cascade(const CascadeTask &t) : task(t) {
        const int64_t K = t.key_channels;
        places = (t.window_height * t.window_width + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
        border = *std::max_element(t.kernel, t.kernel + t.heads) / 2;
        row = t.window_width + 2 * border + AT_ONCE - 1;
        for (int64_t h = 0; h < t.heads; h++) {
            // The convolution's outputs are queries as scores want them.
            const float factor = 1.0f / std::sqrt(static_cast<float>(K));
            const auto &[qkv, conv] = t.layers[h];
            folded.push_back({Affine(qkv, 2 * K + t.channels, t.eps, 1.0f), Affine(conv, K, t.eps, factor), {}});
            const int64_t size = t.kernel[h] * t.kernel[h];
            folded[h].taps.resize(size * K);
            for (int64_t c = 0; c < K; c++)
                for (int64_t i = 0; i < size; i++)
                    folded[h].taps[i * K + c] = conv.weight[c * size + i] * folded[h].conv.scale[c];
        }
    }
};

// What one thread works with; all but `by_place` by channel (or key), then position.
struct CascadeRoom {
    std::vector<float> part, qkv, weights, shares, padded, by_place, biases;

    explicit CascadeRoom(const Cascade &of)
        : part(of.places * of.task.channels), qkv(of.places * (2 * of.task.key_channels + of.task.channels)),
          weights(of.places * (of.places + MOST_LANES)), shares(of.places),
          padded((of.task.window_height + 2 * of.border) * of.row * of.task.key_channels),
          by_place(of.places * of.task.key_channels),
          biases(of.task.window_height * (2 * of.task.window_width + MOST_LANES)) {}
};

// `count` numbers, each by one(to, from) as vectors of its argument's lanes, or alone.
template <int L, class One> INLINE void each(int64_t count, const One &one) {
    int64_t i = 0;
    for (; i + L <= count; i += L) one(std::integral_constant<int, L>(), i);
    for (; L > 4 && i + 4 <= count; i += 4) one(std::integral_constant<int, 4>(), i);
    for (; i < count; i++) one(std::integral_constant<int, 1>(), i);
}

// One window of one image.
template <int L, bool> INLINE void work(const Cascade &of, int64_t image, int64_t window, CascadeRoom &room) {
    typedef Lanes<L> V;
    typedef typename V::Float Float;
    const CascadeTask &t = of.task;
    const int64_t c = t.channels, K = t.key_channels, P = of.places, across = (t.width + t.window_width - 1) / t.window_width;
    const int64_t top = window / across * t.window_height, left = window % across * t.window_width;
    const int64_t height = std::min(t.window_height, t.height - top), width = std::min(t.window_width, t.width - left);
    const int64_t N = height * width, area = t.height * t.width;
    const int64_t run = width == t.width ? N : width;  // positions that are neighbours in memory
    float *part = room.part.data(), *query = room.qkv.data(), *key = query + K * P, *value = key + K * P;
    float *weights = room.weights.data(), *by_place = room.by_place.data();
    const auto zero = [](int64_t, int64_t) INLINED { return Float{}; };

    for (int64_t head = 0; head < t.heads; head++) {
        const Folded &folded = of.folded[head];
        const int64_t first = (image * t.heads + head) * c * area + top * t.width + left;
        for (int64_t channel = 0; channel < c; channel++)
            for (int64_t n = 0; n < N; n += run) {
                const float *from = t.x + first + channel * area + n / width * t.width;
                float *to = part + channel * P + n;
                each<L>(run, [&](auto lanes, int64_t i) INLINED {
                    if constexpr (lanes == 1) to[i] = head ? to[i] + from[i] : from[i];
                    else {
                        typedef Lanes<lanes> W;
                        W::store(to + i, head ? W::load(to + i) + W::load(from + i) : W::load(from + i));
                    }
                });
            }
        products<L>(t.layers[head].qkv.weight, 1, c, c, rows_of(part, P), 2 * K + c, P, zero,
                    [&](int64_t o, int64_t n, const Float &x) INLINED {
                        V::store(query + o * P + n, x * folded.qkv.scale[o] + folded.qkv.shift[o]);
                    });

        // Queries by position, with zeros around the window; then by channel again.
        const int64_t kernel = t.kernel[head], border = kernel / 2, row = width + 2 * border + AT_ONCE - 1;
        float *padded = room.padded.data();
        std::fill(padded, padded + (height + 2 * border) * row * K, 0.0f);
        const auto turned = [&](float *by_channel, const auto &move) INLINED {
            for (int64_t n = 0; n < N; n += L)
                for (int64_t k = 0; k < K; k += L) move(by_channel + k * P + n, n, k);
        };
        turned(query, [&](const float *from, int64_t n, int64_t k) INLINED {
            Float block[L];
            for (int i = 0; i < L; i++) block[i] = V::load(from + i * P);
            V::turn(block);
            for (int i = 0; i < L && n + i < N; i++)
                V::store(padded + (((n + i) / width + border) * row + (n + i) % width + border) * K + k, block[i]);
        });
        for (int64_t y = 0; y < height; y++)
            for (int64_t x = 0; x < width; x += AT_ONCE)
                for (int64_t k = 0; k < K; k += L) {
                    Float sum[AT_ONCE];
                    for (int64_t i = 0; i < AT_ONCE; i++) sum[i] = V::load(&folded.conv.shift[k]);
                    for (int64_t dy = 0; dy < kernel; dy++)
                        for (int64_t dx = 0; dx < kernel; dx++) {
                            const Float tap = V::load(&folded.taps[(dy * kernel + dx) * K + k]);
                            const float *from = padded + ((y + dy) * row + x + dx) * K + k;
                            for (int64_t i = 0; i < AT_ONCE; i++) sum[i] += tap * V::load(from + i * K);
                        }
                    for (int64_t i = 0; i < AT_ONCE && x + i < width; i++)
                        V::store(by_place + (y * width + x + i) * K + k, sum[i]);
                }
        turned(query, [&](float *to, int64_t n, int64_t k) INLINED {
            Float block[L];
            for (int i = 0; i < L; i++) block[i] = V::load(by_place + (n + i) * K + k);
            V::turn(block);
            for (int i = 0; i < L; i++) V::store(to + i * P, block[i]);
        });

        // The table by row and column of a distance, columns to both sides: what a key's row of queries has is a piece.
        const float *table = t.table + head * t.table_width * t.table_width;
        const int64_t columns = 2 * width - 1, step = columns + L;
        for (int64_t y = 0; y < height; y++)
            for (int64_t x = 0; x < columns; x++)
                room.biases[y * step + x] = table[y * t.table_width + std::abs(x - width + 1)];
        for (int64_t n = 0; n < N; n++)
            for (int64_t y = 0; y < height; y++) {
                const float *from = &room.biases[std::abs(y - n / width) * step + width - 1 - n % width];
                for (int64_t x = 0; x < width; x += L) V::store(weights + n * P + y * width + x, V::load(from + x));
            }
        products<L>(key, P, 1, K, rows_of(query, P), N, P,
                    [&](int64_t k, int64_t n) INLINED { return V::load(weights + k * P + n); },
                    [&](int64_t k, int64_t n, const Float &x) INLINED { V::store(weights + k * P + n, x); });
        for (int64_t n = 0; n < N; n += L) V::store(&room.shares[n], softmax<L>(weights + n, P, N));
        products<L>(value, 1, P, N, rows_of(weights, P), c, P, zero, [&](int64_t channel, int64_t n, const Float &x) INLINED {
            V::store(part + channel * P + n, x * V::load(&room.shares[n]));
        });
        for (int64_t channel = 0; channel < c; channel++)
            for (int64_t n = 0; n < N; n += run) {
                const float *from = part + channel * P + n;
                float *to = t.out + first + channel * area + n / width * t.width;
                each<L>(run, [&](auto lanes, int64_t i) INLINED {
                    if constexpr (lanes == 1) to[i] = from[i] < 0.0f ? 0.0f : from[i];
                    else {
                        typedef Lanes<lanes> W;
                        const typename W::Float x = W::load(from + i);
                        W::store(to + i, x < 0.0f ? typename W::Float{} : x);
                    }
                });
            }
    }
}

COPIES(Cascade, int64_t, CascadeRoom, work)

}  // namespace

extern "C" void cascade_forward(const CascadeTask *task) {
    const Cascade cascade(*task);
    const auto one = chosen<false>(task->lanes);
    const auto windows = [](int64_t size, int64_t window) { return (size + window - 1) / window; };
    const int64_t of_image = windows(task->height, task->window_height) * windows(task->width, task->window_width);
    share(task->threads, task->images * of_image, [&] { return CascadeRoom(cascade); },
          [&](int64_t part, CascadeRoom &room) { one(cascade, part / of_image, part % of_image, room); });
}
