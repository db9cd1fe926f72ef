/* Kernels by NVRTC. */
#include <stdio.h>
#include <stdlib.h>

#include "lane.h"

int built(const char *source, const char *name, const char *const *options, void **module, char *why) {
    static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12", NULL};
    Nvrtc rtc;
    const Wanted wanted[] = {
        {&rtc.CreateProgram, "nvrtcCreateProgram"},
        {&rtc.CompileProgram, "nvrtcCompileProgram"},
        {&rtc.GetCUBINSize, "nvrtcGetCUBINSize"},
        {&rtc.GetCUBIN, "nvrtcGetCUBIN"},
        {&rtc.DestroyProgram, "nvrtcDestroyProgram"},
        {NULL, NULL},
    };
    if (found(opened(names), wanted, "NVRTC", why)) return -1;
    void *program = NULL;
    char *binary = NULL;
    size_t size = 0;
    int count = 0;
    while (options[count]) count++;
    int code = rtc.CreateProgram(&program, source, name, 0, NULL, NULL);
    if (!code) code = rtc.CompileProgram(program, count, options);
    if (!code) code = rtc.GetCUBINSize(program, &size);
    if (!code) code = (binary = malloc(size)) ? rtc.GetCUBIN(program, binary) : -1;
    if (!code) code = driver.ModuleLoadData(module, binary);
    if (program) rtc.DestroyProgram(&program);
    free(binary);
    return code ? fail(why, "NVRTC or the driver refuses the kernels", code) : 0;
}
