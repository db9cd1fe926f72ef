#include "host.h"

#include <math.h>
#include <stdlib.h>

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
    float *values = malloc(sizeof *values * (size_t)count);
    for (int64_t i = 0; values && i < count; i++) values[i] = from_e4m3(from[i]);
    return values;
}

static void row_product(const float *x, const float *weight, float *sums, int64_t n, int64_t k, int transposed) {
    for (int64_t j = 0; j < n; j++) sums[j] = 0.0f;
    if (transposed) {
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < k; i++) sums[j] += x[i] * weight[j * k + i];
        return;
    }
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < n; j++) sums[j] += x[i] * weight[i * n + j];
}

int host_product(const float *x, const uint8_t *x8, const float *weight, const uint8_t *weight8, const float *bias,
                 float *out, uint8_t *out8, int64_t m, int64_t n, int64_t k, int transposed, int gelu, float scale,
                 float round) {
    float *wide_x = x8 ? widened(x8, m * k) : NULL, *wide = weight8 ? widened(weight8, k * n) : NULL;
    float *sums = malloc(sizeof *sums * (size_t)n);
    int ready = sums && (!x8 || wide_x) && (!weight8 || wide);
    for (int64_t row = 0; ready && row < m; row++) {
        row_product((x8 ? wide_x : x) + row * k, weight8 ? wide : weight, sums, n, k, transposed);
        for (int64_t j = 0; j < n; j++) {
            float value = scale * sums[j] + bias[j];
            if (gelu) value = gelu_tanh(value);
            if (out8)
                out8[row * n + j] = to_e4m3(value * round);
            else
                out[row * n + j] = value;
        }
    }
    free(wide_x);
    free(wide);
    free(sums);
    return ready ? 0 : -1;
}

void host_quantize(const float *in, uint8_t *out, int64_t count, float inverse) {
    for (int64_t i = 0; i < count; i++) out[i] = to_e4m3(in[i] * inverse);
}

void host_skip_layer_norm(const float *const in[4], float *out, uint8_t *rounded, int64_t rows, int64_t width,
                          float epsilon, float inverse) {
    for (int64_t row = 0; row < rows; row++) {
        const float *x = in[0] + row * width, *skip = in[1] + row * width;
        float *made = out + row * width;
        double mean = 0.0, spread = 0.0;
        for (int64_t i = 0; i < width; i++) mean += made[i] = x[i] + skip[i];
        mean /= (double)width;
        for (int64_t i = 0; i < width; i++) spread += (made[i] - mean) * (made[i] - mean);
        double scale = 1.0 / sqrt(spread / (double)width + epsilon);
        for (int64_t i = 0; i < width; i++) {
            made[i] = (float)((made[i] - mean) * scale) * in[2][i] + in[3][i];
            rounded[row * width + i] = to_e4m3(made[i] * inverse);
        }
    }
}
