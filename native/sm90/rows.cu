#if NORM || EMBED
static __device__ __forceinline__ void apart(uint4 raw, float *values) {
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = wide((Bits)words[i]);
        values[2 * i + 1] = wide((Bits)(words[i] >> 16));
    }
}

static __device__ __forceinline__ uint4 together(const float *values) {
    return make_uint4(narrow2(values[0], values[1]), narrow2(values[2], values[3]), narrow2(values[4], values[5]),
                      narrow2(values[6], values[7]));
}

static __device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
    return value;
}

// A warp has a row of at most 256 VECTORS values, every lane each 32nd vector of 8; the weights are read before the one before ends.
struct Row {
    float values[VECTORS][8];
    uint4 weight[VECTORS], offset[VECTORS];

    __device__ __forceinline__ void by(const uint4 *gamma, const uint4 *beta, int vectors) {
#pragma unroll
        for (int i = 0, at = threadIdx.x % 32; i < VECTORS; i++, at += 32)
            if (at < vectors) {
                weight[i] = gamma[at];
                offset[i] = beta[at];
            }
    }

    // The norm of the values, whose sum over the row is `total`; carried, the same as float32 of it, may be NULL.
    __device__ __forceinline__ void norm(uint4 *out, float4 *carried, float total, int width, float epsilon) {
        int vectors = width / 8, lane = threadIdx.x % 32;
        float mean = sum_of_warp(total) / width, spread = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (lane + 32 * i < vectors) {
#pragma unroll
                for (int j = 0; j < 8; j++) spread += (values[i][j] - mean) * (values[i][j] - mean);
            }
        float by = rsqrtf(sum_of_warp(spread) / width + epsilon);
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (lane + 32 * i < vectors) {
                float w[8], o[8];
                apart(weight[i], w);
                apart(offset[i], o);
#pragma unroll
                for (int j = 0; j < 8; j++) o[j] += (values[i][j] - mean) * by * w[j];
                uint4 rounded = together(o);
                out[lane + 32 * i] = rounded;
                if (carried) {
                    apart(rounded, o);
                    carried[2 * (lane + 32 * i)] = make_float4(o[0], o[1], o[2], o[3]);
                    carried[2 * (lane + 32 * i) + 1] = make_float4(o[4], o[5], o[6], o[7]);
                }
            }
    }
};
#endif

#if NORM
// sums = x + skip, out = norm(sums) * gamma + beta. sums may be NULL. Of `length` rows of a document in x, the first meets row `at` of
// `skips` in skip. carried, float32 of the rows of out from `first` to `last`, may be NULL.
extern "C" __global__ void __launch_bounds__(128)
    rmt_norm(const uint4 *x, const uint4 *skip, const uint4 *gamma, const uint4 *beta, uint4 *out, uint4 *sums, float4 *carried, int rows,
             int width, int length, int skips, int at, int first, int last, float epsilon) {
    next_may_start();
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, vectors = width / 8;
    Row own;
    own.by(gamma, beta, vectors);
    await_the_one_before();
    if (row >= rows) return;
    uint4 left[VECTORS], right[VECTORS];
    u64 start = (u64)row * vectors;
    int document = row / length, place = row % length;
    skip += ((u64)document * skips + at + place) * vectors;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (lane + 32 * i < vectors) {
            left[i] = x[start + lane + 32 * i];
            right[i] = skip[lane + 32 * i];
        }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (lane + 32 * i < vectors) {
            float other[8];
            apart(left[i], own.values[i]);
            apart(right[i], other);
#pragma unroll
            for (int j = 0; j < 8; j++) total += own.values[i][j] += other[j];
            if (sums) sums[start + lane + 32 * i] = together(own.values[i]);
        }
    bool carries = carried && place >= first && place < last;
    carried = carries ? carried + ((u64)document * (last - first) + place - first) * vectors * 2 : 0;
    own.norm(out + start, carried, total, width, epsilon);
}
#endif

#if EMBED
// A step's rows and their norm. frame, of each row of a document: a token, 0 or more; or -1 - i for the i-th of `texts` tokens of its
// segment, and for i beyond them the row i - texts of its memory. rows = word or memory + positions; rows may be NULL.
extern "C" __global__ void __launch_bounds__(128)
    rmt_embed(const float4 *memory, const long long *segment, const long long *frame, const uint4 *word, const uint4 *positions,
           const uint4 *gamma, const uint4 *beta, uint4 *out, uint4 *rows, int documents, int length, int texts, int memories, int words,
           int width, float epsilon) {
    next_may_start();
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, vectors = width / 8, document = row / length;
    Row own;
    own.by(gamma, beta, vectors);
    bool there = document < documents;
    long long place = there ? -1 - frame[row % length] : 0;
    uint4 added[VECTORS], raw[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (there && lane + 32 * i < vectors) added[i] = positions[(u64)(row % length) * vectors + lane + 32 * i];
    await_the_one_before();
    if (!there) return;
    if (place < texts) {
        long long token = place < 0 ? -1 - place : segment[(u64)document * texts + place];
        token = min(max(token, 0ll), words - 1ll); // rows of padding fill a batch up, nobody reads them
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (lane + 32 * i < vectors) raw[i] = word[token * vectors + lane + 32 * i];
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (lane + 32 * i < vectors) apart(raw[i], own.values[i]);
    } else {
        u64 start = ((u64)document * memories + min(place - texts, memories - 1ll)) * vectors * 2;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (lane + 32 * i < vectors) {
                float4 low = memory[start + 2 * (lane + 32 * i)], high = memory[start + 2 * (lane + 32 * i) + 1];
                float both[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int j = 0; j < 8; j++) own.values[i][j] = both[j];
            }
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (lane + 32 * i < vectors) {
            float other[8];
            apart(added[i], other);
#pragma unroll
            for (int j = 0; j < 8; j++) total += own.values[i][j] += other[j];
            if (rows) rows[(u64)row * vectors + lane + 32 * i] = together(own.values[i]);
        }
    own.norm(out + (u64)row * vectors, 0, total, width, epsilon);
}
#endif
