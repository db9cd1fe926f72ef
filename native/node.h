/* A node of one of our operators, and which operators there are. */
#ifndef RMT_NODE_H
#define RMT_NODE_H

#include "gpu.h"
#include "ort.h"

enum {
    LINEAR,
    LINEAR_QUANTIZE,
    QUANTIZE,
    LINEAR_SKIP_LAYER_NORM,
    SKIP_LAYER_NORM_QUANTIZE,
    SILU_MUL,
    SILU_MUL_QUANTIZE,
    ROTARY,
    PACKED_ATTENTION,
    EMBED
};
enum { INPUTS = 7, OUTPUTS = 3, AXES = 8 };

typedef struct {
    OrtCustomOp base; /* first, so that a pointer to it is one to this */
    int kind;
    const char *provider; /* NULL is the CPU's */
    int input[INPUTS], output[OUTPUTS];
} Op;

/* signatures.c */
extern Op OPS[];
extern const size_t OPS_COUNT;

typedef struct {
    const OrtApi *api;
    const Op *op;
    int transposed, gelu, fast, candidates, heads, kv_heads, repeat, causal, rows, at, first, last;
    float scale, inverse, epsilon;
    Lane *lane;
} Node;

/* attributes.c: reads a node's attributes; those that it does not have keep what they are. NULL, or what is wrong with them. */
const char *attributes_read(const OrtApi *api, const OrtKernelInfo *info, Node *node);

#endif
