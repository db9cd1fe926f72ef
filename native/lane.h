/* What libraries.c, gpu.c and products.c share. All of it is used while `gpu_lock` is held. */
#ifndef RMT_LANE_H
#define RMT_LANE_H

#include <pthread.h>

#include "cuda.h"
#include "gpu.h"

enum { WORKSPACE = 32 << 20 }; /* what NVIDIA advises for Hopper */

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

enum { QUANTIZE_KERNEL, NORM_KERNEL, SILU_KERNEL, ROTARY_KERNEL, KERNEL_COUNT };

typedef struct Plan Plan;     /* of products.c */
typedef struct Kernel Kernel; /* of hopper.c */

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
    int capability, processors, version; /* 89 is 8.9; multiprocessors; of the driver, 13000 is 13.0 */
    void *module, *kernels[KERNEL_COUNT][2]; /* of float16 and bfloat16 */
    Plan *plans;
    Kernel *hopper;
    int without_hopper; /* its kernels could not be had: products are left to cuBLASLt */
    Setting setting; /* of products to FP8 that was found to work; SAME before the first */
    int users;
    Lane *next;
};

typedef struct {
    void *to;
    const char *name;
} Wanted;

extern pthread_mutex_t gpu_lock;
extern CublasLt lt;
extern Driver driver;

/* Writes the reason; always -1. */
int fail(char *why, const char *what, int code);

/* libraries.c: a library of these names, one that is loaded before others, or NULL; the functions that are wanted of it,
 * the last without a name; what fills `driver` and `lt`. */
void *opened(const char *const *names);
int found(void *library, const Wanted *wanted, const char *whose, char *why);
int libraries(char *why);

/* gpu.c: the lane of a stream, and its kernels. `rounding` starts a kernel, and gives the driver's code. */
int capturing(void *stream);
int entered(Lane **held, void *stream, char *why);
int compiled(Lane *lane, char *why);

/* compile.c: a module of a source with these options, the last NULL. */
int built(const char *source, const char *name, const char *const *options, void **module, char *why);
int rounding(Lane *lane, int type, const void *in, void *out, int64_t count, float inverse, const float *by);

/* How kernels for compute capability 9.0 do a product: which tiles, -1 where they do not take it, and in how many parts of k,
 * which stand one behind the other. */
typedef struct {
    int tile, parts;
} Way;

/* products.c: room for `bytes` on the device, for as long as the lane is there; a product in this way, or by cuBLASLt, which
 * the way then says. */
void plans_dropped(Plan *plans);
int reserved(Lane *lane, size_t bytes, uint64_t *at, char *why);
int multiplied(Lane *lane, const Product *product, const Operands *at, Way *way, char *why);

/* hopper.c: kernels for compute capability 9.0. The fastest way of at most so many parts, and the kernel's start. */
enum { ABSENT = 1 };
Way hopper_way(const Lane *lane, const Product *product, const Operands *at, int most);
int hopper_product(Lane *lane, const Product *product, const Operands *at, Way way, char *why); /* ABSENT: there is no kernel */
void hopper_dropped(Kernel *kernels);

#endif
