/* cuBLASLt and the CUDA driver, found when they are first used. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "lane.h"

CublasLt lt;
Driver driver;

int fail(char *why, const char *what, int code) {
    snprintf(why, WHY, "%s (%d)", what, code);
    return -1;
}

void *opened(const char *const *names) {
    void *library = NULL;
    for (int loaded = 1; loaded >= 0 && !library; loaded--) /* first what ONNX Runtime has loaded */
        for (const char *const *name = names; *name && !library; name++)
            library = dlopen(*name, RTLD_LAZY | RTLD_LOCAL | (loaded ? RTLD_NOLOAD : 0));
    return library;
}

int found(void *library, const Wanted *wanted, const char *whose, char *why) {
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

int libraries(char *why) {
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
        {&driver.DriverGetVersion, "cuDriverGetVersion"},
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
        {&driver.LaunchKernelEx, "cuLaunchKernelEx"},
        {&driver.FuncSetAttribute, "cuFuncSetAttribute"},
        {&driver.TensorMapEncodeTiled, "cuTensorMapEncodeTiled"},
        {NULL, NULL},
    };
    if (found(opened(cuda), calls, "the CUDA driver", why)) return -1;
    if (found(opened(cublaslt), products, "cuBLASLt", why)) return -1;
    ready = 1;
    return 0;
}
