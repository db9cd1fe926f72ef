/* The parts of cuBLASLt, the CUDA driver and NVRTC that are used, found at run time in the libraries that ONNX Runtime
 * has loaded. Sources of names, numbers and layouts: cublasLt.h, library_types.h, cublas_api.h, cuda.h and nvrtc.h of
 * CUDA 12 and 13.
 */
#ifndef RMT_CUDA_H
#define RMT_CUDA_H

#include <stddef.h>
#include <stdint.h>

enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28 }; /* cudaDataType */
enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };

enum { /* cublasLtMatmulDescAttributes_t */
    DESC_TRANSA = 3,
    DESC_EPILOGUE = 7,
    DESC_BIAS_POINTER = 8,
    DESC_A_SCALE_POINTER = 17,
    DESC_B_SCALE_POINTER = 18,
    DESC_D_SCALE_POINTER = 20,
    DESC_AMAX_D_POINTER = 21,
    DESC_FAST_ACCUM = 25,
    DESC_BIAS_DATA_TYPE = 26
};
enum { EPILOGUE_BIAS = 4, EPILOGUE_GELU_BIAS = 32 | 4 }; /* cublasLtEpilogue_t */
enum { PREF_MAX_WORKSPACE_BYTES = 1 };                   /* cublasLtMatmulPreferenceAttributes_t */

typedef struct {
    uint64_t data[8];
} LtAlgo; /* cublasLtMatmulAlgo_t */

typedef struct {
    LtAlgo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} LtHeuristic; /* cublasLtMatmulHeuristicResult_t */

typedef struct {
    int (*Create)(void **);
    int (*Destroy)(void *);
    int (*MatmulDescCreate)(void **, int compute, int scale);
    int (*MatmulDescDestroy)(void *);
    int (*MatmulDescSetAttribute)(void *, int, const void *, size_t);
    int (*MatrixLayoutCreate)(void **, int type, uint64_t rows, uint64_t columns, int64_t leading);
    int (*MatrixLayoutDestroy)(void *);
    int (*MatmulPreferenceCreate)(void **);
    int (*MatmulPreferenceDestroy)(void *);
    int (*MatmulPreferenceSetAttribute)(void *, int, const void *, size_t);
    int (*MatmulAlgoGetHeuristic)(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference,
                                  int wanted, LtHeuristic *, int *found);
    int (*Matmul)(void *handle, void *desc, const void *alpha, const void *a, void *la, const void *b, void *lb,
                  const void *beta, const void *c, void *lc, void *d, void *ld, const LtAlgo *, void *workspace,
                  size_t bytes, void *stream);
} CublasLt;

typedef struct {
    _Alignas(64) uint64_t opaque[16];
} TensorMap; /* CUtensorMap */

typedef struct {
    int id, pad;
    union {
        char room[64];
        int value;
    };
} LaunchAttribute; /* CUlaunchAttribute */

enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6 }; /* CUlaunchAttributeID */
enum { PROGRAMMATIC_IN_GRAPHS = 12030 };        /* the first driver that captures it */

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    LaunchAttribute *attributes;
    unsigned count;
} Launch; /* CUlaunchConfig */

typedef struct {
    int (*CtxGetCurrent)(void **);
    int (*CtxPushCurrent)(void *);
    int (*CtxPopCurrent)(void **);
    int (*CtxGetDevice)(int *);
    int (*DriverGetVersion)(int *);
    int (*DeviceGetAttribute)(int *, int attribute, int device);
    int (*MemAlloc)(uint64_t *, size_t);
    int (*MemFree)(uint64_t);
    int (*MemsetD32Async)(uint64_t, unsigned, size_t, void *stream);
    int (*StreamIsCapturing)(void *, int *);
    int (*CtxSynchronize)(void);
    int (*EventCreate)(void **, unsigned);
    int (*EventRecord)(void *, void *stream);
    int (*EventSynchronize)(void *);
    int (*EventElapsedTime)(float *, void *, void *);
    int (*EventDestroy)(void *);
    int (*ModuleLoadData)(void **, const void *);
    int (*ModuleUnload)(void *);
    int (*ModuleGetFunction)(void **, void *module, const char *);
    int (*LaunchKernel)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                        void *stream, void **arguments, void **extra);
    int (*LaunchKernelEx)(const Launch *, void *function, void **arguments, void **extra);
    int (*FuncSetAttribute)(void *function, int attribute, int value);
    int (*TensorMapEncodeTiled)(TensorMap *, int type, unsigned axes, const void *at, const uint64_t *sizes,
                                const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                                int swizzle, int promotion, int fill);
} Driver;

enum { MULTIPROCESSOR_COUNT = 16, COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76 }; /* CUdevice_attribute */
enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };                                                       /* CUfunction_attribute */
enum { MAP_FLOAT16 = 6, MAP_BFLOAT16 = 9 };                                                       /* CUtensorMapDataType */
enum { SWIZZLE_64B = 2, SWIZZLE_128B = 3 };                                                       /* CUtensorMapSwizzle */
enum { PROMOTION_L2_128B = 2 };                                                                   /* CUtensorMapL2promotion */
enum { INVALID_VALUE = 1 };                                                                       /* CUresult */

typedef struct {
    int (*CreateProgram)(void **, const char *source, const char *name, int, const char *const *, const char *const *);
    int (*CompileProgram)(void *, int, const char *const *options);
    int (*GetCUBINSize)(void *, size_t *);
    int (*GetCUBIN)(void *, char *);
    int (*DestroyProgram)(void **);
} Nvrtc;

#endif
