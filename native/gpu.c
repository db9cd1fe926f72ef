/* Products by cuBLASLt and our kernels on ONNX Runtime's stream. Nothing is allocated, compiled or waited for after the
 * first run with a shape, so that the second can be captured into a CUDA graph. */
#define _GNU_SOURCE
#include "gpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"
#include "kernels.h" /* made at build: kernels.cu as the string KERNELS */
#include "ort.h"

enum { WORKSPACE = 32 << 20 }; /* what NVIDIA advises for Hopper */
enum { CANDIDATES = 16, TRIALS = 5 };

/* How a product is asked for. With out = FP8, cuBLASLt wants C to have the bias's type and not to be out, and says nowhere
 * whether it may be missing: what a first run finds to work is kept. The last one always does. */
typedef enum {
    SAME,     /* C is out, which has its type */
    NO_C,     /* none, as beta is 0 */
    OTHER_C,  /* another address */
    SCALED,   /* none; scales of all operands, and a place for the largest value */
    APART,    /* the product in the bias's type, rounded by our own kernel */
    SETTINGS
} Setting;

enum { QUANTIZE, SKIP_LAYER_NORM, SILU_MUL, ROTARY, KERNEL_COUNT };
static const char *const KERNEL_NAMES[] = {"quantize", "skip_layer_norm", "silu_mul", "rotary"};

typedef struct Plan Plan;
struct Plan {
    Product product;
    Setting setting;
    void *desc, *x, *weight, *c, *out;
    LtAlgo algo;
    uint64_t wide; /* what APART writes first */
    Plan *next;
};

typedef struct Scratch Scratch;
struct Scratch {
    uint64_t at;
    size_t bytes;
    Scratch *next;
};

struct Lane {
    void *context, *stream, *handle;
    uint64_t workspace; /* and behind it a 1 in float32, and room for one more */
    Scratch *scratch;   /* the largest first; captured graphs may still use the others */
    int capability; /* 89 is 8.9 */
    void *module, *kernels[KERNEL_COUNT][2]; /* of float16 and bfloat16 */
    Plan *plans;
    Setting setting; /* of products to FP8 that was found to work; SAME before the first */
    int users;
    Lane *next;
};

static int64_t taken[SETTINGS]; /* plans by their setting */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Lane *lanes;
static CublasLt lt;
static Driver driver;

static int fail(char *why, const char *what, int code) {
    snprintf(why, WHY, "%s (%d)", what, code);
    return -1;
}

static void *opened(const char *const *names) {
    void *library = NULL;
    for (; *names && !library; names++) library = dlopen(*names, RTLD_LAZY | RTLD_LOCAL);
    return library;
}

typedef struct {
    void *to;
    const char *name;
} Wanted;

static int found(void *library, const Wanted *wanted, const char *whose, char *why) {
    for (; wanted->name; wanted++) {
        void *function = library ? dlsym(library, wanted->name) : NULL;
        if (!function) {
            snprintf(why, WHY, "%s: %s was not found", whose, library ? wanted->name : "the library");
            return -1;
        }
        memcpy(wanted->to, &function, sizeof function);
    }
    return 0;
}

static int libraries(char *why) {
    static int ready;
    if (ready) return 0;
    static const char *const cublaslt[] = {"libcublasLt.so.13", "libcublasLt.so.12", NULL};
    static const char *const cuda[] = {"libcuda.so.1", NULL};
    const Wanted products[] = {
        {&lt.Create, "cublasLtCreate"},
        {&lt.Destroy, "cublasLtDestroy"},
        {&lt.MatmulDescCreate, "cublasLtMatmulDescCreate"},
        {&lt.MatmulDescDestroy, "cublasLtMatmulDescDestroy"},
        {&lt.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute"},
        {&lt.MatrixLayoutCreate, "cublasLtMatrixLayoutCreate"},
        {&lt.MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy"},
        {&lt.MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate"},
        {&lt.MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy"},
        {&lt.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute"},
        {&lt.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic"},
        {&lt.Matmul, "cublasLtMatmul"},
        {NULL, NULL},
    };
    const Wanted calls[] = {
        {&driver.CtxGetCurrent, "cuCtxGetCurrent"},
        {&driver.CtxPushCurrent, "cuCtxPushCurrent_v2"},
        {&driver.CtxPopCurrent, "cuCtxPopCurrent_v2"},
        {&driver.CtxGetDevice, "cuCtxGetDevice"},
        {&driver.DeviceGetAttribute, "cuDeviceGetAttribute"},
        {&driver.MemAlloc, "cuMemAlloc_v2"},
        {&driver.MemFree, "cuMemFree_v2"},
        {&driver.MemsetD32Async, "cuMemsetD32Async"},
        {&driver.StreamIsCapturing, "cuStreamIsCapturing"},
        {&driver.CtxSynchronize, "cuCtxSynchronize"},
        {&driver.EventCreate, "cuEventCreate"},
        {&driver.EventRecord, "cuEventRecord"},
        {&driver.EventSynchronize, "cuEventSynchronize"},
        {&driver.EventElapsedTime, "cuEventElapsedTime"},
        {&driver.EventDestroy, "cuEventDestroy_v2"},
        {&driver.ModuleLoadData, "cuModuleLoadData"},
        {&driver.ModuleUnload, "cuModuleUnload"},
        {&driver.ModuleGetFunction, "cuModuleGetFunction"},
        {&driver.LaunchKernel, "cuLaunchKernel"},
        {NULL, NULL},
    };
    if (found(opened(cuda), calls, "the CUDA driver", why)) return -1;
    if (found(opened(cublaslt), products, "cuBLASLt", why)) return -1;
    ready = 1;
    return 0;
}

static int capturing(void *stream) {
    int status = 0;
    return driver.StreamIsCapturing(stream, &status) != 0 || status != 0;
}

/* The lane of a stream in the current context, counted once for each node that holds it. */
static int entered(Lane **held, void *stream, char *why) {
    void *context = NULL;
    if (libraries(why)) return -1;
    int code = driver.CtxGetCurrent(&context);
    if (code || !context) return fail(why, "no CUDA context is current", code);
    if (*held && (*held)->stream == stream && (*held)->context == context) return 0;
    Lane *lane = lanes;
    while (lane && (lane->stream != stream || lane->context != context)) lane = lane->next;
    if (!lane) {
        if (capturing(stream)) return fail(why, "the first run of a session is captured; run it once before", 0);
        lane = calloc(1, sizeof *lane);
        if (!lane) return fail(why, "no host memory", 0);
        lane->context = context;
        lane->stream = stream;
        unsigned one = 0x3f800000;
        if ((code = lt.Create(&lane->handle)) || (code = driver.MemAlloc(&lane->workspace, WORKSPACE + 256)) ||
            (code = driver.MemsetD32Async(lane->workspace + WORKSPACE, one, 1, stream))) {
            if (lane->handle) lt.Destroy(lane->handle);
            if (lane->workspace) driver.MemFree(lane->workspace);
            free(lane);
            return fail(why, "cuBLASLt or its working memory of 32 MiB could not be had", code);
        }
        lane->next = lanes;
        lanes = lane;
    }
    lane->users++;
    Lane *before = *held;
    *held = lane;
    if (before) before->users--; /* of another stream, whose other nodes move on too; it stays for its next session */
    return 0;
}

static void undescribed(Plan *plan) {
    if (plan->desc) lt.MatmulDescDestroy(plan->desc);
    void **layouts[] = {&plan->x, &plan->weight, &plan->c, &plan->out};
    for (int i = 0; i < 4; i++) {
        if (*layouts[i]) lt.MatrixLayoutDestroy(*layouts[i]);
        *layouts[i] = NULL;
    }
    plan->desc = NULL;
}

static void dropped(Plan *plan) {
    undescribed(plan);
    free(plan);
}

void gpu_release(Lane *lane) {
    if (!lane) return;
    pthread_mutex_lock(&lock);
    if (--lane->users == 0) {
        for (Lane **at = &lanes; *at; at = &(*at)->next)
            if (*at == lane) {
                *at = lane->next;
                break;
            }
        /* At a process's end the driver may be gone before the session, and its memory with it. */
        if (driver.CtxPushCurrent(lane->context) == 0) {
            driver.CtxSynchronize(); /* not the stream: a session may be dropped after its owner ended that */
            for (Plan *plan = lane->plans, *next; plan; plan = next) {
                next = plan->next;
                dropped(plan);
            }
            lt.Destroy(lane->handle);
            driver.MemFree(lane->workspace);
            for (Scratch *scratch = lane->scratch, *next; scratch; scratch = next) {
                next = scratch->next;
                driver.MemFree(scratch->at);
                free(scratch);
            }
            if (lane->module) driver.ModuleUnload(lane->module);
            void *popped;
            driver.CtxPopCurrent(&popped);
        }
        free(lane);
    }
    pthread_mutex_unlock(&lock);
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

static int multiplied(Lane *lane, Plan *plan, const Operands *at, const LtAlgo *algo) {
    float beta = 0.0f;
    void *out = plan->setting == APART ? (void *)(uintptr_t)plan->wide : at->out;
    const void *c = plan->setting == SAME || plan->setting == APART ? out : plan->setting == OTHER_C ? at->x : NULL;
    return lt.Matmul(lane->handle, plan->desc, &plan->product.scale, at->weight, plan->weight, at->x, plan->x, &beta, c,
                     plan->c, out, plan->out, algo, (void *)(uintptr_t)lane->workspace, WORKSPACE, lane->stream);
}

/* Milliseconds of a few products by this algorithm, or a number below 0 where it fails. */
static float timed(Lane *lane, Plan *plan, const Operands *at, const LtAlgo *algo, void *const events[2]) {
    float spent = -1.0f;
    if (multiplied(lane, plan, at, algo)) return -1.0f;
    if (driver.EventRecord(events[0], lane->stream)) return -1.0f;
    for (int i = 0; i < TRIALS; i++)
        if (multiplied(lane, plan, at, algo)) return -1.0f;
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
    if (code || !count) return fail(why, "cuBLASLt has no algorithm for a product of these types and this shape", code);
    plan->algo = results[0].algo;
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

static int loaded(Lane *lane) {
    int code = 0;
    for (int i = 0; i < 2 * KERNEL_COUNT && !code; i++) {
        char kernel[64];
        snprintf(kernel, sizeof kernel, "%s_%s", KERNEL_NAMES[i / 2], i % 2 ? "bfloat16" : "float16");
        code = driver.ModuleGetFunction(&lane->kernels[i / 2][i % 2], lane->module, kernel);
    }
    return code;
}

static int compiled(Lane *lane, char *why) {
    if (lane->module) return 0;
    if (capturing(lane->stream)) return fail(why, "the first run of a session is captured; run it once before", 0);
    static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12", NULL};
    Nvrtc rtc;
    const Wanted wanted[] = {
        {&rtc.CreateProgram, "nvrtcCreateProgram"},
        {&rtc.CompileProgram, "nvrtcCompileProgram"},
        {&rtc.GetCUBINSize, "nvrtcGetCUBINSize"},
        {&rtc.GetCUBIN, "nvrtcGetCUBIN"},
        {&rtc.GetProgramLogSize, "nvrtcGetProgramLogSize"},
        {&rtc.GetProgramLog, "nvrtcGetProgramLog"},
        {&rtc.DestroyProgram, "nvrtcDestroyProgram"},
        {NULL, NULL},
    };
    if (found(opened(names), wanted, "NVRTC", why)) return -1;
    int device = 0, major = 0, minor = 0;
    driver.CtxGetDevice(&device);
    driver.DeviceGetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, device);
    driver.DeviceGetAttribute(&minor, COMPUTE_CAPABILITY_MINOR, device);
    lane->capability = 10 * major + minor;
    char architecture[64];
    snprintf(architecture, sizeof architecture, "--gpu-architecture=sm_%d%d", major, minor);
    const char *options[] = {architecture};
    void *program = NULL;
    char *binary = NULL;
    size_t size = 0;
    int code = rtc.CreateProgram(&program, KERNELS, "kernels.cu", 0, NULL, NULL);
    if (!code) code = rtc.CompileProgram(program, 1, options);
    if (!code) code = rtc.GetCUBINSize(program, &size);
    if (!code) code = (binary = malloc(size)) ? rtc.GetCUBIN(program, binary) : -1;
    if (!code) code = driver.ModuleLoadData(&lane->module, binary);
    if (!code) code = loaded(lane);
    if (program) rtc.DestroyProgram(&program);
    free(binary);
    if (!code) return 0;
    if (lane->module) driver.ModuleUnload(lane->module);
    lane->module = NULL;
    return fail(why, "NVRTC or the driver refuses the kernels", code);
}

/* The kernels are there, and the GPU has FP8 where it is wanted. */
static int prepared(Lane **held, void *stream, int float8, char *why) {
    if (entered(held, stream, why) || compiled(*held, why)) return -1;
    if (!float8 || (*held)->capability >= 89) return 0;
    snprintf(why, WHY, "FP8 needs compute capability 8.9 or higher; this GPU has %d.%d", (*held)->capability / 10,
             (*held)->capability % 10);
    return -1;
}

static int launched(Lane *lane, int kernel, int type, unsigned blocks, unsigned threads, void **arguments) {
    return driver.LaunchKernel(lane->kernels[kernel][type == ORT_BFLOAT16], blocks, 1, 1, threads, 1, 1, 0, lane->stream,
                               arguments, NULL);
}

/* out[i] = E4M3(in[i] * inverse), or by the number at `by` where it is given. */
static int rounding(Lane *lane, int type, const void *in, void *out, int64_t count, float inverse, const float *by) {
    long long number = count;
    void *arguments[] = {&in, &out, &number, &inverse, &by};
    return launched(lane, QUANTIZE, type, (unsigned)((count + 16 * 256 - 1) / (16 * 256)), 256, arguments);
}

/* Room for `bytes` on the device, for as long as the lane is there. */
static int reserved(Lane *lane, size_t bytes, uint64_t *at, char *why) {
    if (!lane->scratch || lane->scratch->bytes < bytes) {
        if (capturing(lane->stream)) return fail(why, "the first run with a shape is captured; run it once before", 0);
        Scratch *made = calloc(1, sizeof *made);
        int code = made ? driver.MemAlloc(&made->at, bytes) : -1;
        if (code) {
            free(made);
            return fail(why, "no memory for a product whose result is rounded apart", code);
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
    int code = multiplied(lane, plan, at, &plan->algo);
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

int gpu_product(Lane **held, void *stream, const Product *product, const Operands *at, char *why) {
    pthread_mutex_lock(&lock);
    int code = entered(held, stream, why);
    Plan *plan = code ? NULL : planned(*held, product, at, why);
    if (plan) {
        plan->product.scale = product->scale;
        code = lt.MatmulDescSetAttribute(plan->desc, DESC_BIAS_POINTER, &at->bias, sizeof at->bias);
        if (!code && at->out_scale && plan->setting != APART)
            code = lt.MatmulDescSetAttribute(plan->desc, DESC_D_SCALE_POINTER, &at->out_scale, sizeof at->out_scale);
        if (!code) code = multiplied(*held, plan, at, &plan->algo);
        if (!code && plan->setting == APART) code = narrowed(*held, plan, at);
        if (code) fail(why, "cuBLASLt failed in a product", code);
    }
    pthread_mutex_unlock(&lock);
    return plan && !code ? 0 : -1;
}

__attribute__((visibility("default"))) void rmt_product_settings(int64_t counts[SETTINGS]) {
    pthread_mutex_lock(&lock);
    memcpy(counts, taken, sizeof taken);
    pthread_mutex_unlock(&lock);
}

int gpu_quantize(Lane **held, void *stream, int type, const void *in, void *out, int64_t count, float inverse, char *why) {
    pthread_mutex_lock(&lock);
    int code = prepared(held, stream, 1, why);
    if (!code && count && (code = rounding(*held, type, in, out, count, inverse, NULL)))
        fail(why, "the driver did not start the kernel 'quantize'", code);
    pthread_mutex_unlock(&lock);
    return code ? -1 : 0;
}

int gpu_skip_layer_norm(Lane **held, void *stream, int type, const void *const in[4], void *out, void *rounded,
                        int64_t rows, int64_t width, float epsilon, float inverse, char *why) {
    if (width % 8 || width > 8192) {
        snprintf(why, WHY, "rows of %lld values; expected a multiple of 8, 8192 at most", (long long)width);
        return -1;
    }
    pthread_mutex_lock(&lock);
    int code = prepared(held, stream, 1, why), columns = (int)width;
    void *arguments[] = {(void *)&in[0], (void *)&in[1], (void *)&in[2], (void *)&in[3], &out,
                         &rounded,       &columns,       &epsilon,       &inverse};
    unsigned threads = (unsigned)((width / 8 + 31) / 32 * 32);
    if (!code && rows && (code = launched(*held, SKIP_LAYER_NORM, type, (unsigned)rows, threads, arguments)))
        fail(why, "the driver did not start the kernel 'skip_layer_norm'", code);
    pthread_mutex_unlock(&lock);
    return code ? -1 : 0;
}

int gpu_silu_mul(Lane **held, void *stream, int type, const void *in, void *out, void *rounded, int64_t rows,
                 int64_t width, float inverse, char *why) {
    if (width % 8) {
        snprintf(why, WHY, "rows of two times %lld values; expected a multiple of 8", (long long)width);
        return -1;
    }
    pthread_mutex_lock(&lock);
    int code = prepared(held, stream, rounded != NULL, why);
    long long vectors = rows * (width / 8), across = width / 8;
    void *arguments[] = {&in, &out, &rounded, &vectors, &across, &inverse};
    if (!code && vectors && (code = launched(*held, SILU_MUL, type, (unsigned)((vectors + 255) / 256), 256, arguments)))
        fail(why, "the driver did not start the kernel 'silu_mul'", code);
    pthread_mutex_unlock(&lock);
    return code ? -1 : 0;
}

int gpu_rotary(Lane **held, void *stream, int type, const void *const in[3], void *const out[3], int64_t rows,
               const Heads *heads, char *why) {
    if (heads->size % 16) {
        snprintf(why, WHY, "heads of %d values; expected a multiple of 16", heads->size);
        return -1;
    }
    pthread_mutex_lock(&lock);
    int code = prepared(held, stream, 0, why);
    long long pairs = rows * (heads->query + 2 * heads->key) * (heads->size / 16);
    int length = heads->length, query = heads->query, key = heads->key, size = heads->size, times = heads->times;
    void *arguments[] = {(void *)&in[0],  (void *)&in[1],  (void *)&in[2], (void *)&out[0], (void *)&out[1],
                         (void *)&out[2], &pairs,          &length,        &query,          &key,
                         &size,           &times};
    if (!code && pairs && (code = launched(*held, ROTARY, type, (unsigned)((pairs + 255) / 256), 256, arguments)))
        fail(why, "the driver did not start the kernel 'rotary'", code);
    pthread_mutex_unlock(&lock);
    return code ? -1 : 0;
}
