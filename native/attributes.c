/* The attributes of our operators' nodes. */
#include <float.h>
#include <limits.h>
#include <string.h>

#include "node.h"

static int given(const OrtApi *api, OrtStatus *status) {
    if (status) ORT_CALL(api, RELEASE_STATUS, void, OrtStatus *)(status);
    return status == NULL;
}

static int integer(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *value) {
    return given(api, ORT_CALL(api, KERNEL_INFO_GET_ATTRIBUTE_INT64, OrtStatus *, const OrtKernelInfo *, const char *,
                               int64_t *)(info, name, value));
}

static int real(const OrtApi *api, const OrtKernelInfo *info, const char *name, float *value) {
    return given(api, ORT_CALL(api, KERNEL_INFO_GET_ATTRIBUTE_FLOAT, OrtStatus *, const OrtKernelInfo *, const char *,
                               float *)(info, name, value));
}

/* Of a text that is too long ONNX Runtime gives the size alone. */
static int text(const OrtApi *api, const OrtKernelInfo *info, const char *name, char *value, size_t *size) {
    size_t room = *size;
    int there = given(api, ORT_CALL(api, KERNEL_INFO_GET_ATTRIBUTE_STRING, OrtStatus *, const OrtKernelInfo *, const char *,
                                    char *, size_t *)(info, name, value, size));
    return there || *size > room;
}

const char *attributes_read(const OrtApi *api, const OrtKernelInfo *info, Node *node) {
    int64_t number;
    float value;
    char word[16];
    const struct {
        const char *name;
        int *to;
    } numbers[] = {{"transposed", &node->transposed}, {"fast", &node->fast},         {"candidates", &node->candidates},
                   {"heads", &node->heads},           {"kv_heads", &node->kv_heads}, {"repeat", &node->repeat},
                   {"causal", &node->causal},         {"rows", &node->rows},         {"at", &node->at},
                   {"first", &node->first},           {"last", &node->last}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        size_t size = sizeof word;
        if (integer(api, info, numbers[i].name, &number)) {
            if (number < INT_MIN || number > INT_MAX) return "rmt_trt: an attribute has more than 32 bits";
            *numbers[i].to = (int)number;
        } else if (real(api, info, numbers[i].name, &value) || text(api, info, numbers[i].name, word, &size))
            return "rmt_trt: an attribute that is a whole number has another type";
    }
    const struct {
        const char *name;
        float *to;
    } floats[] = {{"scale", &node->scale}, {"inverse", &node->inverse}, {"epsilon", &node->epsilon}};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
        size_t size = sizeof word;
        if (real(api, info, floats[i].name, &value))
            *floats[i].to = value;
        else if (integer(api, info, floats[i].name, &number) || text(api, info, floats[i].name, word, &size))
            return "rmt_trt: an attribute that is a number in float32 has another type";
    }
    size_t size = sizeof word;
    if (text(api, info, "activation", word, &size)) {
        node->gelu = size <= sizeof word && strcmp(word, "gelu") == 0;
        if (!node->gelu && (size > sizeof word || strcmp(word, "none") != 0))
            return "rmt_trt: an activation other than 'none' and 'gelu'";
    } else if (integer(api, info, "activation", &number) || real(api, info, "activation", &value))
        return "rmt_trt: an activation other than 'none' and 'gelu'";
    if (!(node->epsilon >= 0.0f && node->epsilon <= FLT_MAX)) return "rmt_trt: an epsilon below 0, or no finite number";
    if (node->op->kind == LINEAR_SKIP_LAYER_NORM && (node->gelu || node->transposed || node->scale != 1.0f))
        return "rmt_trt: a product in front of a norm has no activation, no transposed weight and no scale";
    return NULL;
}
