/* The custom operators of domain "rmt_trt", registered with ONNX Runtime: their schemas, attributes and shapes.
 *
 *   Linear (x (..., k), weight, bias (n)) -> (..., n)
 *       weight (k, n), or (n, k) with transposed = 1; activation "none" or "gelu", the tanh form. Of float16, bfloat16, or
 *       E4M3 with transposed = 1, whose values `scale` brings back; the bias says which half the result is then.
 *   LinearQuantize (x, weight, bias, inverse (1) float32) -> (..., n) E4M3
 *       The same of E4M3, its result multiplied by `inverse` and rounded.
 *   Quantize (x) -> E4M3: x * inverse, rounded to even; what is beyond 448 becomes 448.
 *   SkipLayerNormQuantize (x, skip, gamma, beta) -> (norm(x + skip), the same * inverse as E4M3)
 *   SiluMul (x (..., 2 f)) -> (..., f): silu(x[:f]) * x[f:]
 *   SiluMulQuantize (x) -> the same * inverse as E4M3
 *   Rotary (x (batch, L, (heads + 2 kv_heads) size), cosines (L, size / 2), sines) -> queries, keys, values (batch, L, ...)
 *       queries and keys turned by the angles of their places, a head's first half against its second; with repeat = 1 each
 *       head of keys and values stands there for every head of queries that reads it.
 *   LinearSkipLayerNorm (x (batch, K, k), weight (k, d), bias (d), skip (batch, L, d), gamma, beta)
 *           -> (norm(y + skip) (batch, K, d) [, y + skip] [, carried]), with y = x weight + bias
 *       y's rows meet those of skip from row `at` on. carried (batch, last - first, d) is float32 of the norm's rows from
 *       `first` to `last`.
 *   Embed (memory (batch, m, d) float32, segment (batch, S) int64, frame (L) int64, word (v, d), positions (L, d), gamma,
 *          beta) -> (norm(rows) (batch, L, d) [, rows])
 *       The rows of a step, with positions added. frame says what stands in each: the token 0 or more; -1 - i for the i-th
 *       token of the segment; -1 - S - i for row i of the memory.
 *   PackedAttention (rows (batch, L, 3 h s) [, lengths (batch) int32]) -> (batch, asked, h s)
 *       of h = `heads` heads' queries, then their keys, then their values; a document's rows from its length on are not
 *       attended to. With causal = 1 none is that comes later. `rows` queries are asked, 0 is all: the first ones, or where
 *       causal the last. For heads of 64. It, Embed and LinearSkipLayerNorm are for compute capability 9.0.
 *
 * On the CPU provider they are there in float32, attention for heads of any size. On a GPU of compute capability 9.0 weights,
 * biases, gamma, beta, frame and positions are read before the node in front has ended: they are constants of the graph.
 */
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"
#include "node.h"

static const char *const NAMES[] = {"Linear",  "LinearQuantize",  "Quantize", "LinearSkipLayerNorm", "SkipLayerNormQuantize",
                                    "SiluMul", "SiluMulQuantize", "Rotary",   "PackedAttention",     "Embed"};

typedef struct {
    const void *data;
    int64_t axes[AXES];
    size_t count;
} Tensor;

static OrtStatus *refused(const OrtApi *api, const char *why) {
    return ORT_CALL(api, CREATE_STATUS, OrtStatus *, int, const char *)(ORT_FAIL, why);
}

static OrtStatus *create(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    Node *node = calloc(1, sizeof *node);
    if (!node) return refused(api, "no host memory");
    node->api = api;
    node->op = (const Op *)base;
    node->scale = node->inverse = 1.0f;
    node->epsilon = 1e-5f;
    node->fast = node->candidates = 1;
    const char *wrong = attributes_read(api, info, node);
    if (wrong) {
        free(node);
        return refused(api, wrong);
    }
    *kernel = node;
    return NULL;
}

static void destroy(void *kernel) {
    gpu_release(((Node *)kernel)->lane);
    free(kernel);
}

static int optional_input(const Op *op, size_t index) { return op->kind == PACKED_ATTENTION && index == 1; }
static int optional_output(const Op *op, size_t index) { return (op->kind == LINEAR_SKIP_LAYER_NORM || op->kind == EMBED) && index; }

/* A tensor without axes stands for an optional one that is not given. */
static OrtStatus *input(const Node *node, OrtKernelContext *context, size_t index, Tensor *tensor) {
    const OrtApi *api = node->api;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *info = NULL;
    void *data = NULL;
    OrtStatus *status = ORT_CALL(api, KERNEL_CONTEXT_GET_INPUT, OrtStatus *, const OrtKernelContext *, size_t,
                                 const OrtValue **)(context, index, &value);
    *tensor = (Tensor){0};
    if (!status && !value) return optional_input(node->op, index) ? NULL : refused(api, "rmt_trt: an input is missing");
    if (!status)
        status = ORT_CALL(api, GET_TENSOR_MUTABLE_DATA, OrtStatus *, OrtValue *, void **)((OrtValue *)value, &data);
    if (!status)
        status = ORT_CALL(api, GET_TENSOR_TYPE_AND_SHAPE, OrtStatus *, const OrtValue *,
                          OrtTensorTypeAndShapeInfo **)(value, &info);
    if (status) return status;
    status = ORT_CALL(api, GET_DIMENSIONS_COUNT, OrtStatus *, const OrtTensorTypeAndShapeInfo *, size_t *)(
        info, &tensor->count);
    if (!status && (tensor->count < 1 || tensor->count > AXES))
        status = refused(api, "rmt_trt: an input has no axis, or more than 8");
    if (!status)
        status = ORT_CALL(api, GET_DIMENSIONS, OrtStatus *, const OrtTensorTypeAndShapeInfo *, int64_t *, size_t)(
            info, tensor->axes, tensor->count);
    ORT_CALL(api, RELEASE_TENSOR_TYPE_AND_SHAPE_INFO, void, OrtTensorTypeAndShapeInfo *)(info);
    tensor->data = data;
    return status;
}

static OrtStatus *output(const Node *node, OrtKernelContext *context, size_t index, const Tensor *like, void **data) {
    OrtValue *value = NULL;
    OrtStatus *status =
        ORT_CALL(node->api, KERNEL_CONTEXT_GET_OUTPUT, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t,
                 OrtValue **)(context, index, like->axes, like->count, &value);
    if (status) return status;
    *data = NULL;
    if (!value) return optional_output(node->op, index) ? NULL : refused(node->api, "rmt_trt: an output is missing");
    return ORT_CALL(node->api, GET_TENSOR_MUTABLE_DATA, OrtStatus *, OrtValue *, void **)(value, data);
}

static int64_t values(const Tensor *tensor) {
    int64_t count = 1;
    for (size_t i = 0; i < tensor->count; i++) count *= tensor->axes[i];
    return count;
}

static int on_gpu(const Node *node) { return node->op->provider != NULL; }

static OrtStatus *stream_of(const Node *node, OrtKernelContext *context, void **stream) {
    if (!on_gpu(node)) return NULL;
    return ORT_CALL(node->api, KERNEL_CONTEXT_GET_GPU_COMPUTE_STREAM, OrtStatus *, const OrtKernelContext *, void **)(
        context, stream);
}

static OrtStatus *linear(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    const Tensor *x = &in[0], *weight = &in[1], *bias = &in[2];
    const Op *op = node->op;
    if (weight->count != 2 || bias->count != 1 || (op->kind == LINEAR_QUANTIZE && values(&in[3]) != 1))
        return refused(node->api, "rmt_trt: a product takes a weight with two axes, a bias with one, one number to round by");
    int64_t k = x->axes[x->count - 1], n = weight->axes[node->transposed ? 0 : 1];
    if (!k || weight->axes[node->transposed ? 1 : 0] != k || bias->axes[0] != n)
        return refused(node->api, "rmt_trt: the shapes of a product's input, weight and bias do not fit together");
    Tensor shape = *x;
    shape.axes[x->count - 1] = n;
    void *out = NULL;
    OrtStatus *status = output(node, context, 0, &shape, &out);
    int64_t m = values(x) / k;
    if (status || !m || !n) return status;
    char why[WHY] = "rmt_trt: no host memory";
    int code, float8 = op->input[0] == ORT_FLOAT8, rounds = op->kind == LINEAR_QUANTIZE;
    if (on_gpu(node)) {
        const Product product = {op->input[0],   op->input[2],     op->output[0], node->transposed, node->gelu,
                                 node->fast,     node->candidates, m,             n,                k,
                                 node->scale};
        const Operands at = {x->data, weight->data, bias->data, rounds ? in[3].data : NULL, out};
        code = gpu_product(&node->lane, stream, &product, &at, why);
    } else {
        const void *whole[] = {x->data, weight->data};
        code = host_product(float8 ? NULL : whole[0], float8 ? whole[0] : NULL, float8 ? NULL : whole[1],
                            float8 ? whole[1] : NULL, bias->data, rounds ? NULL : out, rounds ? out : NULL, m, n, k,
                            node->transposed, node->gelu, node->scale, rounds ? *(const float *)in[3].data : 1.0f);
    }
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *quantize(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    void *out = NULL;
    char why[WHY];
    OrtStatus *status = output(node, context, 0, &in[0], &out);
    if (status) return status;
    if (!on_gpu(node)) {
        host_quantize(in[0].data, out, values(&in[0]), node->inverse);
        return NULL;
    }
    int code = gpu_quantize(&node->lane, stream, node->op->input[0], in[0].data, out, values(&in[0]), node->inverse, why);
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *norm_rounded(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    void *out = NULL, *rounded = NULL;
    char why[WHY];
    int64_t width = in[0].axes[in[0].count - 1], count = values(&in[0]);
    if (values(&in[1]) != count || values(&in[2]) != width || values(&in[3]) != width)
        return refused(node->api, "rmt_trt: the shapes of a norm's inputs do not fit together");
    OrtStatus *status = output(node, context, 0, &in[0], &out);
    if (!status) status = output(node, context, 1, &in[0], &rounded);
    if (status || !count) return status;
    const void *const data[] = {in[0].data, in[1].data, in[2].data, in[3].data};
    if (!on_gpu(node)) {
        const float *const floats[] = {data[0], data[1], data[2], data[3]};
        host_norm_rounded(floats, out, rounded, count / width, width, node->epsilon, node->inverse);
        return NULL;
    }
    int code = gpu_norm_rounded(&node->lane, stream, node->op->input[0], data, out, rounded, count / width, width,
                                node->epsilon, node->inverse, why);
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *product_norm(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    const Tensor *x = &in[0], *weight = &in[1], *skip = &in[3];
    int64_t k = x->axes[2], width = weight->axes[1], length = x->axes[1], skips = skip->axes[1];
    if (x->count != 3 || weight->count != 2 || in[2].count != 1 || !k || weight->axes[0] != k || in[2].axes[0] != width)
        return refused(node->api, "rmt_trt: the shapes of a product's input, weight and bias do not fit together");
    if (skip->count != 3 || skip->axes[0] != x->axes[0] || skip->axes[2] != width || width > INT_MAX || skips > INT_MAX ||
        node->at < 0 || node->at > skips - length || node->first < 0 || node->last < node->first || node->last > length ||
        in[4].count != 1 || in[5].count != 1 || in[4].axes[0] != width || in[5].axes[0] != width)
        return refused(node->api, "rmt_trt: the shapes of a norm's inputs and its rows do not fit together");
    const Rows rows = {x->axes[0], (int)width, (int)length, (int)skips, node->at, node->first, node->last};
    Tensor made = *x, carried = *x;
    made.axes[2] = carried.axes[2] = width;
    carried.axes[1] = node->last - node->first;
    void *out[3] = {NULL, NULL, NULL};
    OrtStatus *status = NULL;
    for (size_t i = 0; i < 3 && !status; i++) status = output(node, context, i, i < 2 ? &made : &carried, &out[i]);
    int64_t m = x->axes[0] * length;
    if (status || !m || !width) return status;
    char why[WHY] = "rmt_trt: no host memory";
    int code;
    if (on_gpu(node)) {
        int type = node->op->input[0];
        const Product product = {type, type, type, 0, 0, 1, 1, m, width, k, 1.0f};
        const Operands at = {x->data, weight->data, in[2].data, NULL, NULL};
        const void *const data[] = {skip->data, in[4].data, in[5].data};
        code = gpu_product_norm(&node->lane, stream, &product, &at, data, out, &rows, node->epsilon, why);
    } else {
        const float *const data[] = {x->data, weight->data, in[2].data, skip->data, in[4].data, in[5].data};
        float *const floats[] = {out[0], out[1], out[2]};
        code = host_product_norm(data, floats, &rows, k, node->epsilon);
    }
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *silu_mul(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    void *out = NULL;
    char why[WHY];
    int rounds = node->op->kind == SILU_MUL_QUANTIZE;
    Tensor shape = in[0];
    int64_t width = shape.axes[shape.count - 1] /= 2;
    if (2 * width != in[0].axes[in[0].count - 1])
        return refused(node->api, "rmt_trt: the last axis of a gated activation's input is odd");
    OrtStatus *status = output(node, context, 0, &shape, &out);
    int64_t count = values(&shape);
    if (status || !count) return status;
    void *plain = rounds ? NULL : out, *low = rounds ? out : NULL;
    if (!on_gpu(node)) {
        host_silu_mul(in[0].data, plain, low, count / width, width, node->inverse);
        return NULL;
    }
    int code = gpu_silu_mul(&node->lane, stream, node->op->input[0], in[0].data, plain, low, count / width, width,
                            node->inverse, why);
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *rotary(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    const Tensor *x = &in[0], *angles = &in[1];
    Heads heads = {node->heads, node->kv_heads, 0, 0, 1};
    int64_t all = node->heads + 2 * (int64_t)node->kv_heads, width = x->count == 3 ? x->axes[2] : 0;
    if (node->heads < 1 || node->kv_heads < 1 || node->heads % node->kv_heads || !width || width % (2 * all) ||
        width > INT_MAX || x->axes[1] > INT_MAX || angles->count != 2 || angles->axes[0] != x->axes[1] ||
        angles->axes[1] != width / all / 2 ||
        values(&in[2]) != values(angles))
        return refused(node->api, "rmt_trt: the shapes of rotary positions do not fit together");
    heads.size = (int)(width / all);
    heads.length = (int)x->axes[1];
    heads.times = node->repeat ? node->heads / node->kv_heads : 1;
    void *out[3];
    OrtStatus *status = NULL;
    for (size_t i = 0; i < 3 && !status; i++) {
        Tensor shape = *x;
        shape.axes[2] = (int64_t)heads.size * (i ? node->kv_heads * heads.times : node->heads);
        status = output(node, context, i, &shape, &out[i]);
    }
    int64_t rows = x->axes[0] * x->axes[1];
    if (status || !rows) return status;
    const void *const data[] = {x->data, angles->data, in[2].data};
    if (!on_gpu(node)) {
        const float *const floats[] = {data[0], data[1], data[2]};
        float *const made[] = {out[0], out[1], out[2]};
        host_rotary(floats, made, rows, heads.query, heads.key, heads.size, heads.length, heads.times);
        return NULL;
    }
    char why[WHY];
    int code = gpu_rotary(&node->lane, stream, node->op->input[0], data, out, rows, &heads, why);
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *packed_attention(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    const Tensor *x = &in[0], *lengths = &in[1];
    int64_t width = x->count == 3 ? x->axes[2] : 0;
    if (node->heads < 1 || width < 1 || width > INT_MAX || width % (3 * (int64_t)node->heads) || x->axes[1] > INT_MAX ||
        node->rows < 0 || node->rows > x->axes[1] || (lengths->count && values(lengths) != x->axes[0]))
        return refused(node->api, "rmt_trt: the shapes of attention's inputs, its heads and its rows do not fit together");
    const Attention shape = {x->axes[0],  (int)x->axes[1],         node->rows ? node->rows : (int)x->axes[1],
                             node->heads, (int)(width / 3 / node->heads), node->causal != 0};
    Tensor made = *x;
    made.axes[1] = shape.asked;
    made.axes[2] = width / 3;
    void *out = NULL;
    OrtStatus *status = output(node, context, 0, &made, &out);
    if (status || !values(&made)) return status;
    char why[WHY] = "rmt_trt: no host memory";
    int code = on_gpu(node) ? gpu_attention(&node->lane, stream, node->op->input[0], x->data, lengths->data, out, &shape, why)
                            : host_attention(x->data, lengths->data, out, shape.documents, shape.length, shape.asked,
                                             shape.heads, shape.size, shape.causal);
    return code ? refused(node->api, why) : NULL;
}

static OrtStatus *embed(Node *node, OrtKernelContext *context, const Tensor in[INPUTS], void *stream) {
    const Tensor *memory = &in[0], *segment = &in[1], *word = &in[3];
    int64_t width = memory->axes[2], length = in[2].axes[0];
    int fits = memory->count == 3 && segment->count == 2 && in[2].count == 1 && word->count == 2 && width && length &&
               memory->axes[1] && word->axes[0] && segment->axes[0] == memory->axes[0] && word->axes[1] == width &&
               values(&in[4]) == length * width && values(&in[5]) == width && values(&in[6]) == width && length <= INT_MAX &&
               segment->axes[1] <= INT_MAX && memory->axes[1] <= INT_MAX && word->axes[0] <= INT_MAX && width <= INT_MAX;
    if (!fits) return refused(node->api, "rmt_trt: the shapes of a step's memory, segment, frame and tables do not fit together");
    const Frame frame = {memory->axes[0],     (int)length,        (int)segment->axes[1], (int)memory->axes[1],
                         (int)word->axes[0], (int)width};
    Tensor made = *memory;
    made.axes[1] = length;
    void *out = NULL, *rows = NULL;
    OrtStatus *status = output(node, context, 0, &made, &out);
    if (!status) status = output(node, context, 1, &made, &rows);
    if (status || !values(&made)) return status;
    const void *data[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) data[i] = in[i].data;
    if (!on_gpu(node)) {
        const float *const floats[] = {data[3], data[4], data[5], data[6]};
        host_embed(data[0], data[1], data[2], floats, out, rows, frame.documents, frame.length, frame.texts, frame.memories,
                   frame.words, frame.width, node->epsilon);
        return NULL;
    }
    char why[WHY];
    int code = gpu_embed(&node->lane, stream, node->op->input[3], data, out, rows, &frame, node->epsilon, why);
    return code ? refused(node->api, why) : NULL;
}

static size_t input_count(const OrtCustomOp *base) {
    size_t count = 0;
    while (count < INPUTS && ((const Op *)base)->input[count]) count++;
    return count;
}

static size_t output_count(const OrtCustomOp *base) {
    size_t count = 0;
    while (count < OUTPUTS && ((const Op *)base)->output[count]) count++;
    return count;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    Node *node = kernel;
    Tensor in[INPUTS];
    void *stream = NULL;
    OrtStatus *status = stream_of(node, context, &stream);
    for (size_t i = 0; !status && i < input_count(&node->op->base); i++) status = input(node, context, i, &in[i]);
    if (status) return status;
    switch (node->op->kind) {
        case QUANTIZE: return quantize(node, context, in, stream);
        case LINEAR_SKIP_LAYER_NORM: return product_norm(node, context, in, stream);
        case SKIP_LAYER_NORM_QUANTIZE: return norm_rounded(node, context, in, stream);
        case SILU_MUL:
        case SILU_MUL_QUANTIZE: return silu_mul(node, context, in, stream);
        case ROTARY: return rotary(node, context, in, stream);
        case PACKED_ATTENTION: return packed_attention(node, context, in, stream);
        case EMBED: return embed(node, context, in, stream);
        default: return linear(node, context, in, stream);
    }
}

static const char *name(const OrtCustomOp *base) { return NAMES[((const Op *)base)->kind]; }
static const char *provider(const OrtCustomOp *base) { return ((const Op *)base)->provider; }
static int input_type(const OrtCustomOp *base, size_t index) { return ((const Op *)base)->input[index]; }
static int output_type(const OrtCustomOp *base, size_t index) { return ((const Op *)base)->output[index]; }
static int zero(const OrtCustomOp *base, size_t index) { return (void)base, (void)index, 0; }
/* INPUT_OUTPUT_OPTIONAL is 1, INPUT_OUTPUT_REQUIRED 0. */
static int input_kind(const OrtCustomOp *base, size_t index) { return optional_input((const Op *)base, index); }
static int output_kind(const OrtCustomOp *base, size_t index) { return optional_output((const Op *)base, index); }
static int one(const OrtCustomOp *base) { return (void)base, 1; }
static size_t none(int **a, int **b) { return *a = *b = NULL, 0; }
static void nothing(int *a, int *b) { (void)a, (void)b; }

/* The domain with its operators, made once for all sessions. */
static OrtStatus *made(const OrtApi *api, OrtCustomOpDomain **domain) {
    static OrtCustomOpDomain *kept;
    *domain = kept;
    if (kept) return NULL;
    OrtCustomOpDomain *begun = NULL;
    OrtStatus *status =
        ORT_CALL(api, CREATE_CUSTOM_OP_DOMAIN, OrtStatus *, const char *, OrtCustomOpDomain **)("rmt_trt", &begun);
    if (status) return status;
    for (size_t i = 0; !status && i < OPS_COUNT; i++) {
        OPS[i].base = (OrtCustomOp){
            .version = ORT_VERSION,
            .GetName = name,
            .GetExecutionProviderType = provider,
            .GetInputType = input_type,
            .GetInputTypeCount = input_count,
            .GetOutputType = output_type,
            .GetOutputTypeCount = output_count,
            .KernelDestroy = destroy,
            .GetInputCharacteristic = input_kind,
            .GetOutputCharacteristic = output_kind,
            .GetInputMemoryType = zero,
            .GetVariadicInputMinArity = one,
            .GetVariadicInputHomogeneity = one,
            .GetVariadicOutputMinArity = one,
            .GetVariadicOutputHomogeneity = one,
            .CreateKernelV2 = create,
            .KernelComputeV2 = compute,
            .GetStartVersion = one,
            .GetEndVersion = one,
            .GetMayInplace = none,
            .ReleaseMayInplace = nothing,
            .GetAliasMap = none,
            .ReleaseAliasMap = nothing,
        };
        status = ORT_CALL(api, CUSTOM_OP_DOMAIN_ADD, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)(
            begun, &OPS[i].base);
    }
    if (status)
        ORT_CALL(api, RELEASE_CUSTOM_OP_DOMAIN, void, OrtCustomOpDomain *)(begun);
    else
        *domain = kept = begun;
    return status;
}

/* Called by ONNX Runtime for each session that registers this library. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    const OrtApi *api = base->GetApi(ORT_VERSION);
    if (!api) return NULL; /* older than 1.17; it has no status to say so with, and then no operator of this domain */
    OrtCustomOpDomain *domain = NULL;
    pthread_mutex_lock(&lock);
    OrtStatus *status = made(api, &domain);
    pthread_mutex_unlock(&lock);
    if (status) return status;
    return ORT_CALL(api, ADD_CUSTOM_OP_DOMAIN, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)(options, domain);
}
