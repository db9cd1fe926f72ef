// Kernels that no library has: rounding to FP8, alone and behind a norm; gated activations; rotary positions. Compiled by NVRTC when they are first used.
// No header is included, so that none has to be found. `Half` stands for the 16 bits of a float16 or bfloat16.

typedef unsigned short Bits;

struct Float16 {
    static __device__ float load(Bits bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
    static __device__ Bits store(float value) {
        Bits bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
};

struct Bfloat16 {
    static __device__ float load(Bits bits) { return __uint_as_float((unsigned)bits << 16); }
    static __device__ Bits store(float value) {
#if __CUDA_ARCH__ >= 800
        Bits bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
#else
        unsigned raw = __float_as_uint(value);
        return (Bits)(value != value ? 0x7fff : (raw + 0x7fff + (raw >> 16 & 1)) >> 16);
#endif
    }
};

// Two values as E4M3, rounded to even, those beyond 448 made 448; `low` in the lower byte. GPUs without are refused before.
static __device__ unsigned pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    Bits both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
#else
    return 0;
#endif
}

template <typename Half>
static __device__ void load8(const uint4 *from, float *values) {
    uint4 raw = *from;
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = Half::load((Bits)(words[i] & 0xffff));
        values[2 * i + 1] = Half::load((Bits)(words[i] >> 16));
    }
}

template <typename Half>
static __device__ void store8(uint4 *to, const float *values) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = Half::store(values[2 * i]) | (unsigned)Half::store(values[2 * i + 1]) << 16;
    *to = make_uint4(words[0], words[1], words[2], words[3]);
}

static __device__ uint2 round8(const float *values, float inverse) {
    unsigned words[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        words[i] = pair(values[4 * i] * inverse, values[4 * i + 1] * inverse) |
                   pair(values[4 * i + 2] * inverse, values[4 * i + 3] * inverse) << 16;
    return make_uint2(words[0], words[1]);
}

// out[i] = E4M3(in[i] * inverse), or by the number at `by` where it is given; 16 values a thread.
template <typename Half>
static __device__ void quantize(const Bits *in, unsigned char *out, long long count, float inverse, const float *by) {
    if (by) inverse = *by;
    long long start = 16 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (start + 16 <= count) {
        float values[16];
        load8<Half>((const uint4 *)(in + start), values);
        load8<Half>((const uint4 *)(in + start) + 1, values + 8);
        uint2 low = round8(values, inverse), high = round8(values + 8, inverse);
        *(uint4 *)(out + start) = make_uint4(low.x, low.y, high.x, high.y);
        return;
    }
    for (long long i = start; i < count; i++) out[i] = (unsigned char)pair(Half::load(in[i]) * inverse, 0.0f);
}

static __device__ float sum_of_block(float value, float *shared) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if (blockDim.x == 32) return value;
    __syncthreads(); // those who still read the sum before
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; warp++) total += shared[warp];
    return total;
}

// A row each block: out = norm(in + skip) * gamma + beta, and E4M3(out * inverse). Eight values a thread.
template <typename Half>
static __device__ void skip_layer_norm(const Bits *in, const Bits *skip, const Bits *gamma, const Bits *beta, Bits *out,
                                       unsigned char *rounded, int width, float epsilon, float inverse) {
    __shared__ float shared[32];
    long long row = (long long)blockIdx.x * width;
    int column = 8 * threadIdx.x;
    bool inside = column < width;
    float values[8] = {0.0f}, other[8];
    float total = 0.0f;
    if (inside) {
        load8<Half>((const uint4 *)(in + row + column), values);
        load8<Half>((const uint4 *)(skip + row + column), other);
#pragma unroll
        for (int i = 0; i < 8; i++) total += values[i] += other[i];
    }
    float mean = sum_of_block(total, shared) / width;
    total = 0.0f;
    if (inside) {
#pragma unroll
        for (int i = 0; i < 8; i++) total += (values[i] - mean) * (values[i] - mean);
    }
    float scale = rsqrtf(sum_of_block(total, shared) / width + epsilon);
    if (!inside) return;
    float weight[8];
    load8<Half>((const uint4 *)(gamma + column), weight);
    load8<Half>((const uint4 *)(beta + column), other);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = (values[i] - mean) * scale * weight[i] + other[i];
    store8<Half>((uint4 *)(out + row + column), values);
    *(uint2 *)(rounded + row + column) = round8(values, inverse);
}

// Rows of `across` vectors of gates and as many of values: silu(gate) * value, as it is or as E4M3 of it times `inverse`.
template <typename Half>
static __device__ void silu_mul(const Bits *in, Bits *out, unsigned char *rounded, long long vectors, long long across,
                                float inverse) {
    long long place = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= vectors) return;
    const uint4 *from = (const uint4 *)in + place / across * 2 * across + place % across;
    float gates[8], values[8];
    load8<Half>(from, gates);
    load8<Half>(from + across, values);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= gates[i] / (1.0f + __expf(-gates[i]));
    if (rounded)
        *((uint2 *)rounded + place) = round8(values, inverse);
    else
        store8<Half>((uint4 *)out + place, values);
}

// Rows of heads of queries, keys and values, taken apart; those of queries and keys are rotated by the angles of a row's
// place, (length, size / 2), the first half of a head against the second. Two times eight values a thread.
template <typename Half>
static __device__ void rotary(const Bits *in, const Bits *cosines, const Bits *sines, Bits *queries, Bits *keys,
                              Bits *contents, long long pairs, int length, int query, int key, int size, int times) {
    long long place = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= pairs) return;
    int half = size / 2, across = half / 8, heads = query + 2 * key;
    int vector = (int)(place % across), head = (int)(place / across % heads);
    long long row = place / across / heads;
    const Bits *from = in + (row * heads + head) * size + 8 * vector;
    float low[8], high[8];
    load8<Half>((const uint4 *)from, low);
    load8<Half>((const uint4 *)(from + half), high);
    if (head < query + key) {
        long long angle = row % length * half + 8 * vector;
        float cosine[8], sine[8];
        load8<Half>((const uint4 *)(cosines + angle), cosine);
        load8<Half>((const uint4 *)(sines + angle), sine);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float turned = low[i] * cosine[i] - high[i] * sine[i];
            high[i] = high[i] * cosine[i] + low[i] * sine[i];
            low[i] = turned;
        }
    }
    bool own = head < query;
    int written = own ? 1 : times, group = own ? head : (head - query) % key;
    Bits *to = own ? queries : head < query + key ? keys : contents;
    to += (row * (own ? query : key * times) + (long long)group * written) * size + 8 * vector;
    for (int i = 0; i < written; i++, to += size) {
        store8<Half>((uint4 *)to, low);
        store8<Half>((uint4 *)(to + half), high);
    }
}

#define KERNELS(name, Half)                                                                                            \
    extern "C" __global__ void quantize_##name(const Bits *in, unsigned char *out, long long count, float inverse,     \
                                               const float *by) {                                                      \
        quantize<Half>(in, out, count, inverse, by);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void skip_layer_norm_##name(const Bits *in, const Bits *skip, const Bits *gamma,             \
                                                      const Bits *beta, Bits *out, unsigned char *rounded, int width,  \
                                                      float epsilon, float inverse) {                                  \
        skip_layer_norm<Half>(in, skip, gamma, beta, out, rounded, width, epsilon, inverse);                           \
    }                                                                                                                  \
    extern "C" __global__ void silu_mul_##name(const Bits *in, Bits *out, unsigned char *rounded, long long vectors,   \
                                               long long across, float inverse) {                                      \
        silu_mul<Half>(in, out, rounded, vectors, across, inverse);                                                    \
    }                                                                                                                  \
    extern "C" __global__ void rotary_##name(const Bits *in, const Bits *cosines, const Bits *sines, Bits *queries,    \
                                             Bits *keys, Bits *contents, long long pairs, int length, int query,       \
                                             int key, int size, int times) {                                           \
        rotary<Half>(in, cosines, sines, queries, keys, contents, pairs, length, query, key, size, times);             \
    }

KERNELS(float16, Float16)
KERNELS(bfloat16, Bfloat16)
