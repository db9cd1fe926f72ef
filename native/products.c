/* Products by cuBLASLt: how each is asked for, by which algorithm, and what was found for its shape. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lane.h"
#include "ort.h"

enum { CANDIDATES = 16, TRIALS = 5 };

struct Plan {
    Product product;
    Setting setting;
    void *desc, *x, *weight, *c, *out;
    LtAlgo algo;
    uint64_t wide; /* what APART writes first */
    Plan *next;
};

static int64_t taken[SETTINGS]; /* plans by their setting */

static void undescribed(Plan *plan) {
    if (plan->desc) lt.MatmulDescDestroy(plan->desc);
    void **layouts[] = {&plan->x, &plan->weight, &plan->c, &plan->out};
    for (int i = 0; i < 4; i++) {
        if (*layouts[i]) lt.MatrixLayoutDestroy(*layouts[i]);
        *layouts[i] = NULL;
    }
    plan->desc = NULL;
}

void plans_dropped(Plan *plans) {
    for (Plan *plan = plans, *next; plan; plan = next) {
        next = plan->next;
        undescribed(plan);
        free(plan);
    }
}

static int data_type(int type) {
    switch (type) {
        case ORT_FLOAT16: return CUDA_R_16F;
        case ORT_BFLOAT16: return CUDA_R_16BF;
        case ORT_FLOAT8: return CUDA_R_8F_E4M3;
        default: return CUDA_R_32F;
    }
}

/* cuBLASLt counts columns first: what it is given is out' (n, m) = weight' (n, k) x' (k, m). */
static int described(Lane *lane, Plan *plan, const Operands *at, char *why) {
    const Product *p = &plan->product;
    int out = plan->setting == APART ? p->half : p->out;
    int type = data_type(p->type), half = data_type(p->half), turned = p->transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    int epilogue = p->gelu ? EPILOGUE_GELU_BIAS : EPILOGUE_BIAS;
    signed char fast = (signed char)p->fast;
    int code = lt.MatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_TRANSA, &turned, sizeof turned);
    if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_BIAS_DATA_TYPE, &half, sizeof half);
    if (!code && p->type == ORT_FLOAT8)
        code = lt.MatmulDescSetAttribute(plan->desc, DESC_FAST_ACCUM, &fast, sizeof fast);
    if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_BIAS_POINTER, &at->bias, sizeof at->bias);
    if (!code && out == ORT_FLOAT8)
        code = lt.MatmulDescSetAttribute(plan->desc, DESC_D_SCALE_POINTER, &at->out_scale, sizeof at->out_scale);
    if (plan->setting == SCALED) {
        uint64_t one = lane->workspace + WORKSPACE, largest = one + sizeof(float);
        if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_A_SCALE_POINTER, &one, sizeof one);
        if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_B_SCALE_POINTER, &one, sizeof one);
        if (!code) code = lt.MatmulDescSetAttribute(plan->desc, DESC_AMAX_D_POINTER, &largest, sizeof largest);
    }
    if (!code && p->transposed) code = lt.MatrixLayoutCreate(&plan->weight, type, p->k, p->n, p->k);
    if (!code && !p->transposed) code = lt.MatrixLayoutCreate(&plan->weight, type, p->n, p->k, p->n);
    if (!code) code = lt.MatrixLayoutCreate(&plan->x, type, p->k, p->m, p->k);
    if (!code) code = lt.MatrixLayoutCreate(&plan->c, half, p->n, p->m, p->n);
    if (!code) code = lt.MatrixLayoutCreate(&plan->out, data_type(out), p->n, p->m, p->n);
    return code ? fail(why, "cuBLASLt refuses the description of a product", code) : 0;
}

static int started(Lane *lane, Plan *plan, const Operands *at, const LtAlgo *algo) {
    float beta = 0.0f;
    void *out = plan->setting == APART ? (void *)(uintptr_t)plan->wide : at->out;
    const void *c = plan->setting == SAME || plan->setting == APART ? out : plan->setting == OTHER_C ? at->x : NULL;
    return lt.Matmul(lane->handle, plan->desc, &plan->product.scale, at->weight, plan->weight, at->x, plan->x, &beta, c,
                     plan->c, out, plan->out, algo, (void *)(uintptr_t)lane->workspace, WORKSPACE, lane->stream);
}

/* Milliseconds of a few products by this algorithm, or a number below 0 where it fails. */
static float timed(Lane *lane, Plan *plan, const Operands *at, const LtAlgo *algo, void *const events[2]) {
    float spent = -1.0f;
    if (started(lane, plan, at, algo)) return -1.0f;
    if (driver.EventRecord(events[0], lane->stream)) return -1.0f;
    for (int i = 0; i < TRIALS; i++)
        if (started(lane, plan, at, algo)) return -1.0f;
    if (driver.EventRecord(events[1], lane->stream) || driver.EventSynchronize(events[1])) return -1.0f;
    return driver.EventElapsedTime(&spent, events[0], events[1]) ? -1.0f : spent;
}

/* The first of cuBLASLt's proposals, or the fastest of the first `candidates`. */
static int chosen(Lane *lane, Plan *plan, const Operands *at, char *why) {
    LtHeuristic results[CANDIDATES];
    void *preference = NULL;
    size_t bytes = WORKSPACE;
    int count = 0, wanted = plan->product.candidates;
    wanted = wanted < 1 ? 1 : wanted > CANDIDATES ? CANDIDATES : wanted;
    if (capturing(lane->stream)) wanted = 1;
    int code = lt.MatmulPreferenceCreate(&preference);
    if (!code) code = lt.MatmulPreferenceSetAttribute(preference, PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    if (!code)
        code = lt.MatmulAlgoGetHeuristic(lane->handle, plan->desc, plan->weight, plan->x, plan->c, plan->out, preference,
                                         wanted, results, &count);
    if (preference) lt.MatmulPreferenceDestroy(preference);
    int first = 0; /* of those that cuBLASLt did not take back */
    while (first < count && results[first].state) first++;
    if (code || first >= count)
        return fail(why, "cuBLASLt has no algorithm for a product of these types and this shape", code);
    plan->algo = results[first].algo;
    void *events[2] = {NULL, NULL};
    if (count == 1 || driver.EventCreate(&events[0], 0)) return 0;
    if (driver.EventCreate(&events[1], 0) == 0) {
        float best = -1.0f;
        for (int i = 0; i < count; i++) {
            if (results[i].state) continue;
            float spent = timed(lane, plan, at, &results[i].algo, events);
            if (spent < 0.0f || (best >= 0.0f && spent >= best)) continue;
            best = spent;
            plan->algo = results[i].algo;
        }
        driver.EventDestroy(events[1]);
    }
    driver.EventDestroy(events[0]);
    return 0;
}

static int same(const Product *a, const Product *b) {
    return a->type == b->type && a->half == b->half && a->out == b->out && a->transposed == b->transposed &&
           a->gelu == b->gelu && a->fast == b->fast && a->candidates == b->candidates && a->m == b->m && a->n == b->n &&
           a->k == b->k;
}

int reserved(Lane *lane, size_t bytes, uint64_t *at, char *why) {
    if (!lane->scratch || lane->scratch->bytes < bytes) {
        if (capturing(lane->stream)) return fail(why, "the first run with a shape is captured; run it once before", 0);
        Scratch *made = calloc(1, sizeof *made);
        int code = made ? driver.MemAlloc(&made->at, bytes) : -1;
        if (code) {
            free(made);
            return fail(why, "no memory for a product's parts, or for what is rounded apart", code);
        }
        made->bytes = bytes;
        made->next = lane->scratch;
        lane->scratch = made;
    }
    *at = lane->scratch->at;
    return 0;
}

/* Describes a product in one of its settings, chooses its algorithm, and starts it where that may be refused. */
static int tried(Lane *lane, Plan *plan, const Operands *at, char *why) {
    size_t wide = sizeof(uint16_t) * (size_t)(plan->product.m * plan->product.n);
    if (plan->setting == APART && (compiled(lane, why) || reserved(lane, wide, &plan->wide, why))) return -1;
    if (described(lane, plan, at, why) || chosen(lane, plan, at, why)) return -1;
    if (plan->setting == SAME || capturing(lane->stream)) return 0;
    int code = started(lane, plan, at, &plan->algo);
    return code ? fail(why, "cuBLASLt refuses a product to FP8", code) : 0;
}

static Plan *planned(Lane *lane, const Product *product, const Operands *at, char *why) {
    for (Plan *plan = lane->plans; plan; plan = plan->next)
        if (same(&plan->product, product)) return plan;
    int rounds = product->out == ORT_FLOAT8;
    if (rounds && !lane->setting && capturing(lane->stream)) {
        fail(why, "the first run of a session is captured; run it once before", 0);
        return NULL;
    }
    Plan *plan = calloc(1, sizeof *plan);
    if (!plan) {
        fail(why, "no host memory", 0);
        return NULL;
    }
    plan->product = *product;
    Setting last = rounds ? APART : SAME;
    plan->setting = !rounds ? SAME : lane->setting ? lane->setting : NO_C;
    while (tried(lane, plan, at, why)) {
        undescribed(plan);
        if (plan->setting == last) {
            free(plan);
            return NULL;
        }
        plan->setting++;
    }
    /* The next ones start where this one succeeded. */
    if (rounds && plan->setting != APART) lane->setting = plan->setting;
    taken[plan->setting]++;
    plan->next = lane->plans;
    return lane->plans = plan;
}

/* The last step of APART. */
static int narrowed(Lane *lane, const Plan *plan, const Operands *at) {
    const Product *p = &plan->product;
    return rounding(lane, p->half, (const void *)(uintptr_t)plan->wide, at->out, p->m * p->n, 1.0f, at->out_scale);
}

int multiplied(Lane *lane, const Product *product, const Operands *at, Way *way, char *why) {
    if (way->tile >= 0) {
        int code = hopper_product(lane, product, at, *way, why);
        if (code != ABSENT) return code;
        lane->without_hopper = 1; /* NVRTC is missing, or too old */
    }
    *way = (Way){-1, 1};
    Plan *plan = planned(lane, product, at, why);
    if (!plan) return -1;
    plan->product.scale = product->scale;
    int code = lt.MatmulDescSetAttribute(plan->desc, DESC_BIAS_POINTER, &at->bias, sizeof at->bias);
    if (!code && at->out_scale && plan->setting != APART)
        code = lt.MatmulDescSetAttribute(plan->desc, DESC_D_SCALE_POINTER, &at->out_scale, sizeof at->out_scale);
    if (!code) code = started(lane, plan, at, &plan->algo);
    if (!code && plan->setting == APART) code = narrowed(lane, plan, at);
    return code ? fail(why, "cuBLASLt failed in a product", code) : 0;
}

int gpu_product(Lane **held, void *stream, const Product *product, const Operands *at, char *why) {
    pthread_mutex_lock(&gpu_lock);
    int code = entered(held, stream, why);
    if (!code) {
        Way way = hopper_way(*held, product, at, 1);
        code = multiplied(*held, product, at, &way, why);
    }
    pthread_mutex_unlock(&gpu_lock);
    return code ? -1 : 0;
}

__attribute__((visibility("default"))) void rmt_product_settings(int64_t counts[SETTINGS]) {
    pthread_mutex_lock(&gpu_lock);
    memcpy(counts, taken, sizeof taken);
    pthread_mutex_unlock(&gpu_lock);
}
