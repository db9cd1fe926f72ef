/* What the operators ask of a GPU. Every function returns 0, or -1 with the reason in `why`. */
#ifndef RMT_GPU_H
#define RMT_GPU_H

#include <stddef.h>
#include <stdint.h>

enum { WHY = 512 };

/* A product (m, k) x (k, n), or x (n, k) transposed, with its epilogue. Types are numbers of ort.h; `half` is that of the
 * bias. Equal products share what was found for them. */
typedef struct {
    int type, half, out;
    int transposed, gelu, fast, candidates;
    int64_t m, n, k;
    float scale;
} Product;

typedef struct {
    const void *x, *weight, *bias;
    const float *out_scale; /* on the device, or NULL */
    void *out;
} Operands;

/* What belongs to a stream: a handle, working memory, compiled kernels, the plans of products. NULL before its first use. */
typedef struct Lane Lane;

int gpu_product(Lane **lane, void *stream, const Product *product, const Operands *at, char *why);
int gpu_quantize(Lane **lane, void *stream, int type, const void *in, void *out, int64_t count, float inverse, char *why);
/* The norm of in[0] + in[1]; rounded is E4M3(out * inverse). */
int gpu_norm_rounded(Lane **lane, void *stream, int type, const void *const in[4], void *out, void *rounded, int64_t rows,
                     int64_t width, float epsilon, float inverse, char *why);
/* Rows of documents: `length` of each in a product and its norm, `skips` in what is added, where they meet those from `at`
 * on. `first` to `last` are carried. */
typedef struct {
    int64_t documents;
    int width, length, skips, at, first, last;
} Rows;

/* The norm of a product in half precision and in[0], with in[1] and in[2] as its weight and bias; `at` has no place for the
 * product itself. out: the norm, the sum, and float32 of the rows that are carried; the last two may be NULL. */
int gpu_product_norm(Lane **lane, void *stream, const Product *product, const Operands *at, const void *const in[3],
                     void *const out[3], const Rows *rows, float epsilon, char *why);
/* Attention over rows of queries, keys and values, for `asked` queries of each document: its first ones, or where causal
 * its last. lengths, on the device, or NULL. */
typedef struct {
    int64_t documents;
    int length, asked, heads, size, causal;
} Attention;

int gpu_attention(Lane **lane, void *stream, int type, const void *rows, const int *lengths, void *out,
                  const Attention *shape, char *why);
/* Rows of `query` heads, `key` heads and as many of values, of `size` values each; `length` rows are a document. Each head
 * of keys and values is written `times` times. */
typedef struct {
    int query, key, size, length, times;
} Heads;

int gpu_silu_mul(Lane **lane, void *stream, int type, const void *in, void *out, void *rounded, int64_t rows,
                 int64_t width, float inverse, char *why);
int gpu_rotary(Lane **lane, void *stream, int type, const void *const in[3], void *const out[3], int64_t rows,
               const Heads *heads, char *why);
/* The rows of a step: documents x length of them, put together from `texts` tokens and `memories` rows of a document, out of
 * a table of `words`. in: memory, segment, frame, word, positions, gamma, beta. */
typedef struct {
    int64_t documents;
    int length, texts, memories, words, width;
} Frame;

int gpu_embed(Lane **lane, void *stream, int type, const void *const in[7], void *out, void *rows, const Frame *frame,
              float epsilon, char *why);
void gpu_release(Lane *lane);

#endif
