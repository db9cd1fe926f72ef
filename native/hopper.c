/* Kernels for compute capability 9.0: which product takes which tiles, and how they are started. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hopper.h" /* made at build: sm90/ as the string HOPPER */
#include "lane.h"
#include "ort.h"

enum { DEEP = 64, HEAD = 64, KEYS = 64, RING = 2, SHARERS = 4 }; /* k and keys of a tile; attention's STAGES and GROUPS */
enum { WIDEST = 2048 };  /* row that a warp takes */
enum { LONGEST = 4096 }; /* k: cuBLASLt gives parts of longer sums to more multiprocessors */
enum { MOST_PARTS = 4 }; /* of k, where a norm adds them */

/* What a kernel is compiled with. */
typedef struct {
    int product, attention, norm, embed, bfloat, rows, columns, stages, gelu, apart, groups, causal, once, vectors, full, parts;
} Macros;

struct Kernel {
    Macros macros;
    void *module, *function;
    Kernel *next;
};

/* Tiles of a product, and what they take on an H200, about, in nanoseconds: a step of 64 of k, and what comes before and
 * behind the steps. A norm takes EACH_PART longer for a part more. */
static const struct {
    int rows, columns, stages, step, apart;
} TILES[] = {{64, 64, 8, 135, 1250}, {64, 96, 6, 200, 1500}, {128, 64, 8, 180, 1850}, {128, 96, 6, 275, 2100}, {128, 128, 5, 330, 1900}};
enum { EACH_PART = 480 };
enum { TILES_COUNT = sizeof TILES / sizeof *TILES };
static int64_t products_started[TILES_COUNT][MOST_PARTS];

static int compiled_for(Lane *lane, const Macros *macros, unsigned shared, void **function, char *why) {
    for (Kernel *kernel = lane->hopper; kernel; kernel = kernel->next)
        if (memcmp(&kernel->macros, macros, sizeof *macros) == 0) {
            *function = kernel->function;
            return 0;
        }
    if (capturing(lane->stream)) return fail(why, "the first run of a session is captured; run it once before", 0);
    const struct {
        const char *name;
        int value;
    } defined[] = {{"PRODUCT", macros->product}, {"ATTENTION", macros->attention}, {"NORM", macros->norm},
                   {"EMBED", macros->embed},     {"BFLOAT", macros->bfloat},       {"ROWS", macros->rows},
                   {"COLUMNS", macros->columns}, {"STAGES", macros->stages},       {"GELU", macros->gelu},
                   {"APART", macros->apart},     {"GROUPS", macros->groups},       {"CAUSAL", macros->causal},
                   {"ONCE", macros->once},       {"VECTORS", macros->vectors},     {"FULL", macros->full},
                   {"PARTS", macros->parts}};
    enum { COUNT = sizeof defined / sizeof *defined };
    char written[COUNT][32];
    const char *options[COUNT + 2] = {"--gpu-architecture=sm_90a"};
    for (int i = 0, at = 1; i < COUNT; i++)
        if (defined[i].value) { /* a macro of 0 is one that is not there */
            snprintf(written[i], sizeof written[i], "-D%s=%d", defined[i].name, defined[i].value);
            options[at++] = written[i];
        }
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return fail(why, "no host memory", 0);
    kernel->macros = *macros;
    if (built(HOPPER, "hopper.cu", options, &kernel->module, why)) {
        free(kernel);
        return ABSENT;
    }
    const char *name = macros->product     ? "rmt_product"
                       : macros->attention ? "rmt_attention"
                       : macros->norm      ? "rmt_norm"
                                           : "rmt_embed";
    int code = driver.ModuleGetFunction(&kernel->function, kernel->module, name);
    if (!code && shared) code = driver.FuncSetAttribute(kernel->function, MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)shared);
    if (code) {
        driver.ModuleUnload(kernel->module);
        free(kernel);
        return fail(why, "the driver refuses a kernel for Hopper", code);
    }
    kernel->next = lane->hopper;
    lane->hopper = kernel;
    *function = kernel->function;
    return 0;
}

void hopper_dropped(Kernel *kernels) {
    for (Kernel *kernel = kernels, *next; kernel; kernel = next) {
        next = kernel->next;
        driver.ModuleUnload(kernel->module);
        free(kernel);
    }
}

/* Where `early`, as a programmatic dependent of what is before it on the stream, if the driver can capture that. */
static int enqueued(Lane *lane, void *function, const int64_t grid[3], unsigned threads, unsigned shared, void **arguments,
                    int early, char *why) {
    for (int i = 0; i < 3; i++)
        if (grid[i] > (i ? 65535 : INT_MAX)) return fail(why, "more documents or rows than a kernel for Hopper takes", 0);
    LaunchAttribute dependent = {.id = PROGRAMMATIC_STREAM_SERIALIZATION, .value = 1};
    const Launch launch = {{(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]}, {threads, 1, 1}, shared, lane->stream,
                           &dependent, early && lane->version >= PROGRAMMATIC_IN_GRAPHS};
    int code = driver.LaunchKernelEx(&launch, function, arguments, NULL);
    return code ? fail(why, "the driver did not start a kernel for Hopper", code) : 0;
}

/* A map of halves, the axis of neighbours first, for boxes of it. */
static int mapped(TensorMap *map, int type, int axes, const void *at, const uint64_t *sizes, const unsigned *box,
                  int swizzle, char *why) {
    uint64_t strides[2] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
    const unsigned ones[3] = {1, 1, 1};
    int code = driver.TensorMapEncodeTiled(map, type == ORT_BFLOAT16 ? MAP_BFLOAT16 : MAP_FLOAT16, (unsigned)axes, at,
                                           sizes, strides, box, ones, 0, swizzle, PROMOTION_L2_128B, 0);
    return code ? fail(why, "the driver refuses the description of a tensor", code) : 0;
}

static int64_t over(int64_t count, int64_t by) { return (count + by - 1) / by; }

/* What is done first, of what has a multiprocessor for each block. */
static Way way_for(const Lane *lane, int64_t m, int64_t n, int64_t k, int most) {
    Way best = {-1, 1};
    int64_t shortest = INT64_MAX, steps = k / DEEP;
    for (int i = 0; i < TILES_COUNT; i++)
        for (int parts = 1; parts <= most && parts <= steps; parts++) {
            int64_t blocks = over(m, TILES[i].rows) * over(n, TILES[i].columns) * parts;
            int64_t spent = over(steps, parts) * TILES[i].step + TILES[i].apart + (parts - 1) * EACH_PART;
            if (blocks > lane->processors || spent >= shortest) continue;
            shortest = spent;
            best = (Way){i, parts};
        }
    return best;
}

Way hopper_way(const Lane *lane, const Product *p, const Operands *at, int most) {
    int half = p->type == ORT_FLOAT16 || p->type == ORT_BFLOAT16;
    int aligned = ((uintptr_t)at->x | (uintptr_t)at->weight | (uintptr_t)at->out) % 16 == 0;
    int plain = half && p->out == p->type && p->half == p->type && !p->transposed && p->scale == 1.0f && p->candidates == 1;
    int sized = p->m <= INT_MAX && p->n <= INT_MAX && p->k <= LONGEST && p->k % DEEP == 0 && p->n % 8 == 0;
    if (lane->capability != 90 || lane->without_hopper || !plain || !sized || !aligned) return (Way){-1, 1};
    return way_for(lane, p->m, p->n, p->k, most);
}

int hopper_product(Lane *lane, const Product *p, const Operands *at, Way way, char *why) {
    int rows = TILES[way.tile].rows, columns = TILES[way.tile].columns;
    const Macros macros = {.product = 1, .bfloat = p->type == ORT_BFLOAT16, .rows = rows, .columns = columns,
                           .stages = TILES[way.tile].stages, .gelu = p->gelu, .apart = way.parts > 1};
    int ring = macros.stages * (rows + columns) * DEEP * 2, made = rows * (columns * 2 + 16);
    unsigned shared = (unsigned)(1024 + ring + made), box = columns % 64 ? 32 : 64;
    void *function;
    TensorMap x, w;
    const uint64_t x_sizes[] = {(uint64_t)p->k, (uint64_t)p->m}, w_sizes[] = {(uint64_t)p->n, (uint64_t)p->k};
    const unsigned x_box[] = {DEEP, (unsigned)rows}, w_box[] = {box, DEEP};
    int code = compiled_for(lane, &macros, shared, &function, why);
    if (code) return code;
    if (mapped(&x, p->type, 2, at->x, x_sizes, x_box, SWIZZLE_128B, why) ||
        mapped(&w, p->type, 2, at->weight, w_sizes, w_box, box == 64 ? SWIZZLE_128B : SWIZZLE_64B, why))
        return -1;
    int m = (int)p->m, n = (int)p->n, k = (int)p->k;
    void *arguments[] = {&x, &w, (void *)&at->bias, (void *)&at->out, &m, &n, &k};
    const int64_t grid[] = {over(n, columns), over(m, rows), way.parts};
    code = enqueued(lane, function, grid, (unsigned)(rows / 64 * 128 + 64), shared, arguments, 1, why);
    if (!code) products_started[way.tile][way.parts - 1]++;
    return code;
}

/* How many products were started, by their tiles and by their parts of k, as far as `counts` has room; how many numbers that are. */
__attribute__((visibility("default"))) int rmt_hopper_products(int64_t *counts, int room) {
    enum { COUNT = TILES_COUNT * MOST_PARTS };
    pthread_mutex_lock(&gpu_lock);
    if (room > 0) memcpy(counts, products_started, sizeof **products_started * (size_t)(room < COUNT ? room : COUNT));
    pthread_mutex_unlock(&gpu_lock);
    return COUNT;
}

/* The lane of a stream, on a GPU that these kernels are for. */
static int hopper(Lane **held, void *stream, char *why) {
    if (entered(held, stream, why)) return -1;
    if ((*held)->capability == 90) return 0;
    snprintf(why, WHY, "this kernel needs compute capability 9.0; this GPU has %d.%d", (*held)->capability / 10,
             (*held)->capability % 10);
    return -1;
}

/* The norm of a product's parts, one behind the other, and a residual: in is these, the residual, gamma and beta. It reads the
 * residual before the product has ended. Of our own products we know that they let it start no earlier than that is there. */
static int normed(Lane *lane, int type, const void *const in[4], Way way, void *const out[3], const Rows *rows, float epsilon,
                  char *why) {
    int early = way.tile >= 0;
    int vectors = (int)over(rows->width, 256);
    const Macros macros = {.norm = 1, .bfloat = type == ORT_BFLOAT16, .vectors = vectors,
                           .full = rows->width == 256 * vectors, .parts = way.parts};
    void *function;
    int64_t all = rows->documents * rows->length;
    if (all > INT_MAX) return fail(why, "more rows than a norm takes", 0);
    if (compiled_for(lane, &macros, 0, &function, why)) return -1;
    int count = (int)all, width = rows->width, length = rows->length, skips = rows->skips, at = rows->at,
        first = rows->first, last = rows->last;
    void *arguments[] = {(void *)&in[0],  (void *)&in[1],  (void *)&in[2], (void *)&in[3], (void *)&out[0],
                         (void *)&out[1], (void *)&out[2], &count,         &width,         &length,
                         &skips,          &at,             &first,         &last,          &epsilon};
    const int64_t grid[] = {over(all, 4), 1, 1};
    return enqueued(lane, function, grid, 128, 0, arguments, early, why);
}

int gpu_product_norm(Lane **held, void *stream, const Product *product, const Operands *at, const void *const in[3],
                     void *const out[3], const Rows *rows, float epsilon, char *why) {
    if (rows->width % 8 || rows->width > WIDEST) {
        snprintf(why, WHY, "rows of %d values; expected a multiple of 8, %d at most", rows->width, WIDEST);
        return -1;
    }
    pthread_mutex_lock(&gpu_lock);
    int code = hopper(held, stream, why);
    if (!code) {
        Lane *lane = *held;
        Operands with = *at;
        with.out = out[0]; /* what is in one part is normed where it lies: each row is read before it is written */
        Way way = hopper_way(lane, product, &with, MOST_PARTS);
        uint64_t parts = (uintptr_t)with.out;
        if (way.parts > 1)
            code = reserved(lane, sizeof(uint16_t) * (size_t)(product->m * product->n) * (size_t)way.parts, &parts, why);
        with.out = (void *)(uintptr_t)parts;
        if (!code) code = multiplied(lane, product, &with, &way, why);
        const void *const all[] = {with.out, in[0], in[1], in[2]};
        if (!code) code = normed(lane, product->type, all, way, out, rows, epsilon, why);
    }
    pthread_mutex_unlock(&gpu_lock);
    return code ? -1 : 0;
}

int gpu_embed(Lane **held, void *stream, int type, const void *const in[7], void *out, void *rows, const Frame *frame,
              float epsilon, char *why) {
    if (frame->width % 8 || frame->width > WIDEST) {
        snprintf(why, WHY, "rows of %d values; expected a multiple of 8, %d at most", frame->width, WIDEST);
        return -1;
    }
    pthread_mutex_lock(&gpu_lock);
    const Macros macros = {.embed = 1, .bfloat = type == ORT_BFLOAT16, .vectors = (int)over(frame->width, 256),
                           .full = frame->width % 256 == 0};
    void *function;
    int code = hopper(held, stream, why);
    if (!code) code = compiled_for(*held, &macros, 0, &function, why);
    if (!code && frame->documents * frame->length > INT_MAX) code = fail(why, "more rows than a step takes", 0);
    if (!code) {
        int documents = (int)frame->documents, length = frame->length, texts = frame->texts, memories = frame->memories,
            words = frame->words, width = frame->width;
        void *arguments[] = {(void *)&in[0], (void *)&in[1], (void *)&in[2], (void *)&in[3], (void *)&in[4], (void *)&in[5],
                             (void *)&in[6], &out,           &rows,          &documents,     &length,        &texts,
                             &memories,      &words,         &width,         &epsilon};
        const int64_t grid[] = {over((int64_t)documents * length, 4), 1, 1};
        code = enqueued(*held, function, grid, 128, 0, arguments, 1, why);
    }
    pthread_mutex_unlock(&gpu_lock);
    return code;
}

int gpu_attention(Lane **held, void *stream, int type, const void *rows, const int *lengths, void *out,
                  const Attention *shape, char *why) {
    if (shape->size != HEAD) {
        snprintf(why, WHY, "heads of %d values; expected %d", shape->size, HEAD);
        return -1;
    }
    pthread_mutex_lock(&gpu_lock);
    const Macros macros = {.attention = 1, .bfloat = type == ORT_BFLOAT16, .stages = RING, .groups = SHARERS,
                           .causal = shape->causal, .once = shape->length <= 2 * SHARERS * KEYS};
    unsigned shared = 1024 + (KEYS + 2 * RING * SHARERS * KEYS) * HEAD * 2 + SHARERS * KEYS * (HEAD * 2 + 16);
    TensorMap map;
    const uint64_t sizes[] = {3 * (uint64_t)shape->heads * HEAD, (uint64_t)shape->length, (uint64_t)shape->documents};
    const unsigned box[] = {HEAD, KEYS, 1};
    void *function;
    int code = hopper(held, stream, why);
    if (!code) code = compiled_for(*held, &macros, shared, &function, why);
    if (!code) code = mapped(&map, type, 3, rows, sizes, box, SWIZZLE_128B, why);
    if (!code) {
        int asked = shape->asked, length = shape->length;
        float scale = 0.125f * 1.44269504f; /* 1 / sqrt(HEAD), log2(e) */
        void *arguments[] = {&map, &lengths, &out, &asked, &length, &scale};
        const int64_t grid[] = {over(asked, 64), shape->heads, shape->documents};
        code = enqueued(*held, function, grid, SHARERS * 128, shared, arguments, 1, why);
    }
    pthread_mutex_unlock(&gpu_lock);
    return code;
}
