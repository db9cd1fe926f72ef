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

// A warp has a row of at most 256 VECTORS values, as many where FULL, every lane each 32nd vector of 8; the weights are read before the
// one before ends.
#ifndef FULL
#define FULL 0
#endif
#define THERE(i) (FULL || lane + 32 * (i) < vectors)
struct Row {
    float values[VECTORS][8], weight[VECTORS][8], offset[VECTORS][8];

    __device__ __forceinline__ void by(const uint4 *gamma, const uint4 *beta, int vectors) {
        int lane = threadIdx.x % 32;
        uint4 w[VECTORS], o[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) {
                w[i] = gamma[lane + 32 * i];
                o[i] = beta[lane + 32 * i];
            }
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) {
                apart(w[i], weight[i]);
                apart(o[i], offset[i]);
            }
    }

    // The norm of the values; carried, the same as float32 of it, may be NULL. share: 1 / width.
    __device__ __forceinline__ void norm(uint4 *out, float4 *carried, int vectors, float share, float epsilon) {
        int lane = threadIdx.x % 32;
        float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f}; // chains of additions that do not wait for each other
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) {
#pragma unroll
                for (int j = 0; j < 8; j++) parts[j % 4] += values[i][j];
            }
        float mean = sum_of_warp((parts[0] + parts[1]) + (parts[2] + parts[3])) * share;
#pragma unroll
        for (int j = 0; j < 4; j++) parts[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    values[i][j] -= mean;
                    parts[j % 4] += values[i][j] * values[i][j];
                }
            }
        float by = rsqrtf(sum_of_warp((parts[0] + parts[1]) + (parts[2] + parts[3])) * share + epsilon);
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) {
                float o[8];
#pragma unroll
                for (int j = 0; j < 8; j++) o[j] = offset[i][j] + values[i][j] * by * weight[i][j];
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
// sums = x + skip, out = norm(sums) * gamma + beta. x is the sum of PARTS, one behind the other, where there are more than one as
// `PART` of them; sums may be NULL. Of `length` rows of
// a document in x, the first meets row `at` of `skips` in skip. carried, float32 of the rows of out from `first` to `last`, may be NULL.
extern "C" __global__ void __launch_bounds__(128)
    rmt_norm(const uint4 *x, const uint4 *skip, const uint4 *gamma, const uint4 *beta, uint4 *out, uint4 *sums, float4 *carried, int rows,
             int width, int length, int skips, int at, int first, int last, float epsilon) {
    next_may_start();
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, vectors = width / 8;
    Row own;
    own.by(gamma, beta, vectors);
    uint4 left[PARTS][VECTORS], right[VECTORS];
    u64 start = (u64)row * vectors;
    int document = row / length, place = row % length;
    skip += ((u64)document * skips + at + place) * vectors;
    bool carries = carried && place >= first && place < last;
    carried = carries ? carried + ((u64)document * (last - first) + place - first) * vectors * 2 : 0;
    float share = 1.0f / width;
    bool there = row < rows;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) // the residual is in the L2 cache: a product lets this start when all in front of it has ended
        if (THERE(i) && there) right[i] = __ldcg(skip + lane + 32 * i);
    await_the_one_before();
    if (!there) return;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (THERE(i)) {
#pragma unroll
            for (int p = 0; p < PARTS; p++) left[p][i] = x[(u64)p * rows * vectors + start + lane + 32 * i];
        }
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (THERE(i)) {
            float other[8];
            apart(left[0][i], own.values[i]);
#pragma unroll
            for (int p = 1; p < PARTS; p++) {
                apart(left[p][i], other);
#pragma unroll
                for (int j = 0; j < 8; j++) own.values[i][j] += other[j];
            }
            apart(right[i], other);
#pragma unroll
            for (int j = 0; j < 8; j++) own.values[i][j] = own.values[i][j] * (PARTS > 1 ? 1 / PART : 1) + other[j];
            if (sums) sums[start + lane + 32 * i] = together(own.values[i]);
        }
    own.norm(out + start, carried, vectors, share, epsilon);
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
        if (there && THERE(i)) added[i] = positions[(u64)(row % length) * vectors + lane + 32 * i];
    await_the_one_before();
    if (!there) return;
    if (place < texts) {
        long long token = place < 0 ? -1 - place : segment[(u64)document * texts + place];
        token = min(max(token, 0ll), words - 1ll); // rows of padding fill a batch up, nobody reads them
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) raw[i] = word[token * vectors + lane + 32 * i];
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) apart(raw[i], own.values[i]);
    } else {
        u64 start = ((u64)document * memories + min(place - texts, memories - 1ll)) * vectors * 2;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (THERE(i)) {
                float4 low = memory[start + 2 * (lane + 32 * i)], high = memory[start + 2 * (lane + 32 * i) + 1];
                float both[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (int j = 0; j < 8; j++) own.values[i][j] = both[j];
            }
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (THERE(i)) {
            float other[8];
            apart(added[i], other);
#pragma unroll
            for (int j = 0; j < 8; j++) own.values[i][j] += other[j];
            if (rows) rows[(u64)row * vectors + lane + 32 * i] = together(own.values[i]);
        }
    own.norm(out + (u64)row * vectors, 0, vectors, 1.0f / width, epsilon);
}
#endif
