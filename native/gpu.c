/* Lanes and our kernels, on ONNX Runtime's stream. Nothing is allocated, compiled or waited for after the first run with a
 * shape, so that the second can be captured into a CUDA graph. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h" /* made at build: kernels.cu as the string KERNELS */
#include "lane.h"
#include "ort.h"

static const char *const KERNEL_NAMES[] = {"quantize", "skip_layer_norm", "silu_mul", "rotary"};

pthread_mutex_t gpu_lock = PTHREAD_MUTEX_INITIALIZER;
static Lane *lanes;

int capturing(void *stream) {
    int status = 0;
    return driver.StreamIsCapturing(stream, &status) != 0 || status != 0;
}

/* The lane of a stream in the current context, counted once for each node that holds it. */
int entered(Lane **held, void *stream, char *why) {
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
        int device = 0, major = 0, minor = 0;
        driver.CtxGetDevice(&device);
        driver.DeviceGetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, device);
        driver.DeviceGetAttribute(&minor, COMPUTE_CAPABILITY_MINOR, device);
        driver.DeviceGetAttribute(&lane->processors, MULTIPROCESSOR_COUNT, device);
        driver.DriverGetVersion(&lane->version);
        lane->capability = 10 * major + minor;
        lane->next = lanes;
        lanes = lane;
    }
    lane->users++;
    Lane *before = *held;
    *held = lane;
    if (before) before->users--; /* of another stream; what is under way there may still use it */
    return 0;
}

static void ended(Lane *lane) {
    /* At a process's end the driver may be gone before the session, and its memory with it. */
    if (driver.CtxPushCurrent(lane->context) == 0) {
        driver.CtxSynchronize(); /* not the stream: a session may be dropped after its owner ended that */
        plans_dropped(lane->plans);
        lt.Destroy(lane->handle);
        driver.MemFree(lane->workspace);
        for (Scratch *scratch = lane->scratch, *next; scratch; scratch = next) {
            next = scratch->next;
            driver.MemFree(scratch->at);
            free(scratch);
        }
        if (lane->module) driver.ModuleUnload(lane->module);
        hopper_dropped(lane->hopper);
        void *popped;
        driver.CtxPopCurrent(&popped);
    }
    free(lane);
}

/* With a lane go those that all their nodes left for another stream. */
void gpu_release(Lane *lane) {
    if (!lane) return;
    pthread_mutex_lock(&gpu_lock);
    lane->users--;
    for (Lane **at = &lanes; *at;) {
        Lane *one = *at;
        if (one->users) {
            at = &one->next;
            continue;
        }
        *at = one->next;
        ended(one);
    }
    pthread_mutex_unlock(&gpu_lock);
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

int compiled(Lane *lane, char *why) {
    if (lane->module) return 0;
    if (capturing(lane->stream)) return fail(why, "the first run of a session is captured; run it once before", 0);
    char architecture[64];
    snprintf(architecture, sizeof architecture, "--gpu-architecture=sm_%d", lane->capability);
    const char *options[] = {architecture, NULL};
    if (built(KERNELS, "kernels.cu", options, &lane->module, why)) return -1;
    int code = loaded(lane);
    if (!code) return 0;
    driver.ModuleUnload(lane->module);
    lane->module = NULL;
    return fail(why, "the driver refuses the kernels", code);
}

/* The kernels are there, and the GPU has FP8 where it is wanted. */
static int prepared(Lane **held, void *stream, int float8, char *why) {
    if (entered(held, stream, why) || compiled(*held, why)) return -1;
    if (!float8 || (*held)->capability >= 89) return 0;
    snprintf(why, WHY, "FP8 needs compute capability 8.9 or higher; this GPU has %d.%d", (*held)->capability / 10,
             (*held)->capability % 10);
    return -1;
}

static int launched(Lane *lane, int kernel, int type, int64_t blocks, unsigned threads, void **arguments) {
    if (blocks > INT_MAX) return INVALID_VALUE; /* what the driver says of a grid that is too large */
    return driver.LaunchKernel(lane->kernels[kernel][type == ORT_BFLOAT16], (unsigned)blocks, 1, 1, threads, 1, 1, 0,
                               lane->stream, arguments, NULL);
}

/* out[i] = E4M3(in[i] * inverse), or by the number at `by` where it is given. */
int rounding(Lane *lane, int type, const void *in, void *out, int64_t count, float inverse, const float *by) {
    long long number = count;
    void *arguments[] = {&in, &out, &number, &inverse, &by};
    return launched(lane, QUANTIZE_KERNEL, type, (count + 16 * 256 - 1) / (16 * 256), 256, arguments);
}

int gpu_quantize(Lane **held, void *stream, int type, const void *in, void *out, int64_t count, float inverse, char *why) {
    pthread_mutex_lock(&gpu_lock);
    int code = prepared(held, stream, 1, why);
    if (!code && count && (code = rounding(*held, type, in, out, count, inverse, NULL)))
        fail(why, "the driver did not start the kernel 'quantize'", code);
    pthread_mutex_unlock(&gpu_lock);
    return code ? -1 : 0;
}

int gpu_norm_rounded(Lane **held, void *stream, int type, const void *const in[4], void *out, void *rounded, int64_t rows,
                     int64_t width, float epsilon, float inverse, char *why) {
    if (width % 8 || width > 8192) {
        snprintf(why, WHY, "rows of %lld values; expected a multiple of 8, 8192 at most", (long long)width);
        return -1;
    }
    pthread_mutex_lock(&gpu_lock);
    int code = prepared(held, stream, 1, why), columns = (int)width;
    void *arguments[] = {(void *)&in[0], (void *)&in[1], (void *)&in[2], (void *)&in[3], &out,
                         &rounded,       &columns,       &epsilon,       &inverse};
    unsigned threads = (unsigned)((width / 8 + 31) / 32 * 32);
    if (!code && rows && (code = launched(*held, NORM_KERNEL, type, rows, threads, arguments)))
        fail(why, "the driver did not start the kernel 'skip_layer_norm'", code);
    pthread_mutex_unlock(&gpu_lock);
    return code ? -1 : 0;
}

int gpu_silu_mul(Lane **held, void *stream, int type, const void *in, void *out, void *rounded, int64_t rows,
                 int64_t width, float inverse, char *why) {
    if (width % 8) {
        snprintf(why, WHY, "rows of two times %lld values; expected a multiple of 8", (long long)width);
        return -1;
    }
    pthread_mutex_lock(&gpu_lock);
    int code = prepared(held, stream, rounded != NULL, why);
    long long vectors = rows * (width / 8), across = width / 8;
    void *arguments[] = {&in, &out, &rounded, &vectors, &across, &inverse};
    if (!code && vectors && (code = launched(*held, SILU_KERNEL, type, (vectors + 255) / 256, 256, arguments)))
        fail(why, "the driver did not start the kernel 'silu_mul'", code);
    pthread_mutex_unlock(&gpu_lock);
    return code ? -1 : 0;
}

int gpu_rotary(Lane **held, void *stream, int type, const void *const in[3], void *const out[3], int64_t rows,
               const Heads *heads, char *why) {
    if (heads->size % 16) {
        snprintf(why, WHY, "heads of %d values; expected a multiple of 16", heads->size);
        return -1;
    }
    pthread_mutex_lock(&gpu_lock);
    int code = prepared(held, stream, 0, why);
    long long pairs = rows * (heads->query + 2 * heads->key) * (heads->size / 16);
    int length = heads->length, query = heads->query, key = heads->key, size = heads->size, times = heads->times;
    void *arguments[] = {(void *)&in[0],  (void *)&in[1],  (void *)&in[2], (void *)&out[0], (void *)&out[1],
                         (void *)&out[2], &pairs,          &length,        &query,          &key,
                         &size,           &times};
    if (!code && pairs && (code = launched(*held, ROTARY_KERNEL, type, (pairs + 255) / 256, 256, arguments)))
        fail(why, "the driver did not start the kernel 'rotary'", code);
    pthread_mutex_unlock(&gpu_lock);
    return code ? -1 : 0;
}
