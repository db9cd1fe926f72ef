/* The operators in float32 on the host: what they compute, and what the graphs' twins are checked with. */
#ifndef RMT_HOST_H
#define RMT_HOST_H

#include <stdint.h>

#include "gpu.h"

uint8_t to_e4m3(float value);
float from_e4m3(uint8_t code);

/* out (m, n) = x (m, k) weight (k, n), or weight (n, k) transposed, times `scale`, plus bias, through tanh-GELU if asked
 * for. Of x and weight, and of out, one pair is given: float32, or E4M3 with `round` multiplied before rounding. 0, or -1
 * without memory. */
int host_product(const float *x, const uint8_t *x8, const float *weight, const uint8_t *weight8, const float *bias,
                 float *out, uint8_t *out8, int64_t m, int64_t n, int64_t k, int transposed, int gelu, float scale,
                 float round);
void host_quantize(const float *in, uint8_t *out, int64_t count, float inverse);
void host_norm_rounded(const float *const in[4], float *out, uint8_t *rounded, int64_t rows, int64_t width, float epsilon,
                       float inverse);
/* The norm of a product and a residual as gpu.h says. in: x, weight (k, width), bias, residual, gamma, beta. 0, or -1 without
 * memory. */
int host_product_norm(const float *const in[6], float *const out[3], const Rows *rows, int64_t k, float epsilon);
/* The rows of a step as gpu.h says; rows may be NULL. */
void host_embed(const float *memory, const int64_t *segment, const int64_t *frame, const float *const in[4], float *out,
                float *rows, int64_t documents, int length, int texts, int memories, int words, int width, float epsilon);
/* Attention as gpu.h says, of any size of heads. 0, or -1 without memory. */
int host_attention(const float *rows, const int *lengths, float *out, int64_t documents, int length, int asked, int heads,
                   int size, int causal);
/* rows of 2 * width values; `rounded` is given in place of `out` or not at all. */
void host_silu_mul(const float *in, float *out, uint8_t *rounded, int64_t rows, int64_t width, float inverse);
/* As `Heads` of gpu.h says. */
void host_rotary(const float *const in[3], float *const out[3], int64_t rows, int query, int key, int size, int length,
                 int times);

#endif
