#include "host.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* E4M3 (OCP 8-bit floating point, 1.0): 4 bits of exponent with bias 7, 3 of fraction, no infinity, 0x7f is NaN. */
uint8_t to_e4m3(float value) {
    uint8_t sign = signbit(value) ? 0x80 : 0;
    float size = fabsf(value);
    if (isnan(value)) return sign | 0x7f;
    if (size >= 448.0f) return sign | 0x7e;
    int exponent = 0;
    frexpf(size, &exponent); /* size = f * 2^exponent, 0.5 <= f < 1 */
    if (exponent < -5 || size == 0.0f) exponent = -5;
    /* In steps of the last place; rintf rounds halves to even, and what it rounds up carries into the exponent. */
    int steps = (int)rintf(ldexpf(size, 4 - exponent));
    return sign | (uint8_t)(steps + ((exponent + 5) << 3));
}

float from_e4m3(uint8_t code) {
    int exponent = (code >> 3) & 15, fraction = code & 7;
    float size = exponent ? ldexpf((float)(8 + fraction), exponent - 10) : ldexpf((float)fraction, -9);
    if ((code & 0x7f) == 0x7f) size = NAN;
    return code & 0x80 ? -size : size;
}

static float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

static float *widened(const uint8_t *from, int64_t count) {
    float *values = malloc(sizeof *values * (size_t)count), table[256];
    for (int i = 0; i < 256; i++) table[i] = from_e4m3((uint8_t)i);
    for (int64_t i = 0; values && i < count; i++) values[i] = table[from[i]];
    return values;
}

/* (n, k) -> (k, n), so that the sums of a row lie side by side. */
static float *turned(const float *from, int64_t n, int64_t k) {
    float *values = malloc(sizeof *values * (size_t)(n * k));
    for (int64_t j = 0; values && j < n; j++)
        for (int64_t i = 0; i < k; i++) values[i * n + j] = from[j * k + i];
    return values;
}

/* sums (ROWS, n) = x (ROWS, k) weight (k, n); several rows at once, as the weights have to come from memory. */
enum { ROWS = 8 };
static void rows_product(const float *x, const float *weight, float *restrict sums, int64_t rows, int64_t n, int64_t k) {
    memset(sums, 0, sizeof *sums * (size_t)(rows * n));
    for (int64_t i = 0; i < k; i++)
        for (int64_t row = 0; row < rows; row++) {
            float factor = x[row * k + i];
            for (int64_t j = 0; j < n; j++) sums[row * n + j] += factor * weight[i * n + j];
        }
}

int host_product(const float *x, const uint8_t *x8, const float *weight, const uint8_t *weight8, const float *bias,
                 float *out, uint8_t *out8, int64_t m, int64_t n, int64_t k, int transposed, int gelu, float scale,
                 float round) {
    float *wide_x = x8 ? widened(x8, m * k) : NULL, *wide = weight8 ? widened(weight8, k * n) : NULL, *flat = NULL;
    float *sums = malloc(sizeof *sums * (size_t)(ROWS * n));
    int ready = sums && (!x8 || wide_x) && (!weight8 || wide);
    if (ready && transposed) ready = (flat = turned(weight8 ? wide : weight, n, k)) != NULL;
    for (int64_t start = 0; ready && start < m; start += ROWS) {
        int64_t rows = m - start < ROWS ? m - start : ROWS;
        rows_product((x8 ? wide_x : x) + start * k, flat ? flat : weight8 ? wide : weight, sums, rows, n, k);
        for (int64_t i = 0; i < rows * n; i++) {
            float value = scale * sums[i] + bias[i % n];
            if (gelu) value = gelu_tanh(value);
            if (out8)
                out8[start * n + i] = to_e4m3(value * round);
            else
                out[start * n + i] = value;
        }
    }
    free(wide_x);
    free(wide);
    free(flat);
    free(sums);
    return ready ? 0 : -1;
}

void host_quantize(const float *in, uint8_t *out, int64_t count, float inverse) {
    for (int64_t i = 0; i < count; i++) out[i] = to_e4m3(in[i] * inverse);
}

/* out = norm(x + skip) * gamma + beta, of a row; sums may be NULL. */
static void norm_of_sum(const float *x, const float *skip, const float *gamma, const float *beta, float *out, float *sums,
                        int64_t width, float epsilon) {
    double mean = 0.0, spread = 0.0;
    for (int64_t i = 0; i < width; i++) mean += out[i] = x[i] + skip[i];
    mean /= (double)width;
    if (sums) memcpy(sums, out, sizeof *out * (size_t)width);
    for (int64_t i = 0; i < width; i++) spread += (out[i] - mean) * (out[i] - mean);
    double scale = 1.0 / sqrt(spread / (double)width + epsilon);
    for (int64_t i = 0; i < width; i++) out[i] = (float)((out[i] - mean) * scale) * gamma[i] + beta[i];
}

void host_norm_rounded(const float *const in[4], float *out, uint8_t *rounded, int64_t rows, int64_t width, float epsilon,
                       float inverse) {
    for (int64_t row = 0; row < rows; row++)
        norm_of_sum(in[0] + row * width, in[1] + row * width, in[2], in[3], out + row * width, NULL, width, epsilon);
    for (int64_t i = 0; i < rows * width; i++) rounded[i] = to_e4m3(out[i] * inverse);
}

int host_product_norm(const float *const in[6], float *const out[3], const Rows *rows, int64_t k, float epsilon) {
    int64_t width = rows->width, count = rows->documents * rows->length;
    float *product = count > INT64_MAX / width / (int64_t)sizeof *product ? NULL : malloc((size_t)(count * width) * sizeof *product);
    if (!product || host_product(in[0], NULL, in[1], NULL, in[2], product, NULL, count, width, k, 0, 0, 1.0f, 1.0f)) {
        free(product);
        return -1;
    }
    for (int64_t row = 0; row < count; row++) {
        int64_t document = row / rows->length, place = row % rows->length, carried = rows->last - rows->first;
        const float *skip = in[3] + (document * rows->skips + rows->at + place) * width;
        float *made = out[0] + row * width;
        norm_of_sum(product + row * width, skip, in[4], in[5], made, out[1] ? out[1] + row * width : NULL, width, epsilon);
        if (out[2] && place >= rows->first && place < rows->last)
            memcpy(out[2] + (document * carried + place - rows->first) * width, made, sizeof *made * (size_t)width);
    }
    free(product);
    return 0;
}

void host_embed(const float *memory, const int64_t *segment, const int64_t *frame, const float *const in[4], float *out,
                float *rows, int64_t documents, int length, int texts, int memories, int words, int width, float epsilon) {
    for (int64_t row = 0; row < documents * length; row++) {
        int64_t document = row / length, place = -1 - frame[row % length];
        const float *from;
        if (place < texts) {
            int64_t token = place < 0 ? -1 - place : segment[document * texts + place];
            token = token < 0 ? 0 : token < words ? token : words - 1;
            from = in[0] + token * width;
        } else {
            int64_t carried = place - texts < memories ? place - texts : memories - 1;
            from = memory + (document * memories + carried) * width;
        }
        norm_of_sum(from, in[1] + row % length * width, in[2], in[3], out + row * width, rows ? rows + row * width : NULL,
                    width, epsilon);
    }
}

int host_attention(const float *rows, const int *lengths, float *out, int64_t documents, int length, int asked, int heads,
                   int size, int causal) {
    float *weights = malloc(sizeof *weights * (size_t)length), scale = 1.0f / sqrtf((float)size);
    int64_t width = 3 * (int64_t)heads * size;
    if (!weights) return -1;
    for (int64_t place = 0; place < documents * asked * heads; place++) {
        int head = (int)(place % heads), query = (int)(place / heads % asked);
        int64_t document = place / heads / asked;
        int row = causal ? length - asked + query : query, valid = length;
        if (lengths && lengths[document] < valid) valid = lengths[document];
        if (causal && row + 1 < valid) valid = row + 1;
        const float *of = rows + document * length * width, *asks = of + row * width + head * size;
        const float *keys = of + (int64_t)(heads + head) * size, *values = keys + (int64_t)heads * size;
        float *to = out + place * size, highest = -INFINITY, total = 0.0f;
        for (int i = 0; i < valid; i++) {
            weights[i] = 0.0f;
            for (int j = 0; j < size; j++) weights[i] += asks[j] * keys[i * width + j];
            highest = fmaxf(highest, weights[i] *= scale);
        }
        for (int i = 0; i < valid; i++) total += weights[i] = expf(weights[i] - highest);
        for (int j = 0; j < size; j++) to[j] = 0.0f;
        for (int i = 0; i < valid; i++)
            for (int j = 0; j < size; j++) to[j] += weights[i] / total * values[i * width + j];
    }
    free(weights);
    return 0;
}

void host_silu_mul(const float *in, float *out, uint8_t *rounded, int64_t rows, int64_t width, float inverse) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) {
            float gate = in[2 * row * width + i], value = in[(2 * row + 1) * width + i] * gate / (1.0f + expf(-gate));
            if (rounded)
                rounded[row * width + i] = to_e4m3(value * inverse);
            else
                out[row * width + i] = value;
        }
}

void host_rotary(const float *const in[3], float *const out[3], int64_t rows, int query, int key, int size, int length,
                 int times) {
    int half = size / 2, heads = query + 2 * key;
    for (int64_t place = 0; place < rows * heads; place++) {
        int64_t row = place / heads;
        int head = (int)(place % heads), own = head < query, written = own ? 1 : times;
        const float *from = in[0] + place * size, *cosine = in[1] + row % length * half, *sine = in[2] + row % length * half;
        int turned = head < query + key, group = own ? head : (head - query) % key;
        float *to = out[own ? 0 : turned ? 1 : 2] + (row * (own ? query : key * times) + (int64_t)group * written) * size;
        for (int copy = 0; copy < written; copy++, to += size)
            for (int i = 0; i < half; i++) {
                float low = from[i], high = from[i + half];
                to[i] = turned ? low * cosine[i] - high * sine[i] : low;
                to[i + half] = turned ? high * cosine[i] + low * sine[i] : high;
            }
    }
}
