#if ATTENTION
// Attention over heads of 64. A block takes 64 queries of a head; its GROUPS warpgroups take tiles of 64 keys and their values in turn,
// each by TMA into a ring of STAGES of its own, and put together what they found. With ONCE no group has more than two tiles, and takes
// them at once.
#define SIDE 8192 // bytes of 64 rows of a head
#define WORKERS (GROUPS * 128)
#define NONE (-1e30f)
#ifndef ONCE
#define ONCE 0
#endif
#define AT_ONCE (ONCE ? 2 : 1) // tiles that a group takes at once
#define PARTS_AT (SIDE + GROUPS * STAGES * 2 * SIDE) // behind the tiles
#define ROW_BYTES 144 // of 64 values of a query, with room so that no two lanes meet in a bank

static __device__ __forceinline__ void score(float (&d)[32], u64 queries, u64 keys, bool add) {
    if (add)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF " {" P0 "}, %32, %33, 1, 1, 1, 0, 0;"
                     : F32(d, 0)
                     : "l"(queries), "l"(keys));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF " {" P0 "}, %32, %33, 0, 1, 1, 0, 0;"
                     : F32(d, 0)
                     : "l"(queries), "l"(keys));
}

static __device__ __forceinline__ void weigh(float (&d)[32], const u32 *weights, u64 values, bool add) {
    if (add)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF " {" P0 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : F32(d, 0)
                     : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF " {" P0 "}, {%32, %33, %34, %35}, %36, 0, 1, 1, 1;"
                     : F32(d, 0)
                     : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}

static __device__ __forceinline__ void bring(u32 to, const TensorMap *map, int x, int y, int z, u32 bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

static __device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// rows: (documents, length, 3 heads 64), queries, keys, values. Asked are `asked` queries of each document: the first ones, or where
// causal the last. lengths: of each document, or NULL. scale: of the scores, times log2(e).
extern "C" __global__ void __launch_bounds__(WORKERS, 1)
    rmt_attention(const __grid_constant__ TensorMap rows, const int *lengths, Bits *out, int asked, int length, float scale) {
    extern __shared__ unsigned char raw[];
    __shared__ u64 keys_there[GROUPS][STAGES], values_there[GROUPS][STAGES], asked_for;
    __shared__ float2 met[GROUPS][64];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    u32 base = (shared_of(raw) + 1023) & ~1023u, ring = base + SIDE + group * STAGES * 2 * SIDE;
    u32 keys0 = shared_of(keys_there), values0 = shared_of(values_there), ready = shared_of(&asked_for);
    int head = blockIdx.y, heads = gridDim.y, document = blockIdx.z, row = blockIdx.x * 64;
    next_may_start();
    if (warp == 0 && elected()) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&rows) : "memory");
        barrier_init(ready, 1);
#pragma unroll
        for (int i = 0; i < GROUPS * STAGES; i++) {
            barrier_init(keys0 + 8 * i, 1);
            barrier_init(values0 + 8 * i, 1);
        }
        barriers_made();
    }
    __syncthreads();
    await_the_one_before();
    int valid = lengths ? min(lengths[document], length) : length, end = valid, shift = 0;
#if CAUSAL
    shift = length - asked;
    end = min(end, row + 64 + shift);
#endif
    int tiles = max(1, (end + 63) / 64), count = (tiles - group + GROUPS - 1) / GROUPS;
    // Keys (1) or values (2) of a group's tile of this number: of all tiles number * GROUPS + group.
    auto fetch = [&](int to, int number, int what) {
        int slot = to * STAGES + number % STAGES;
        u32 bar = (what == 1 ? keys0 : values0) + 8 * slot;
        expect(bar, SIDE);
        bring(base + (1 + slot * 2 + what - 1) * SIDE, &rows, (what * heads + head) * 64, (number * GROUPS + to) * 64, document, bar);
    };
    if (warp == (GROUPS - 1) * 4 && elected()) { // one group's after the other's: what comes in is the limit, and the first begins early
        expect(ready, SIDE);
        bring(base, &rows, head * 64, row + shift, document, ready);
#pragma unroll
        for (int what = 1; what <= 2; what++)
            for (int g = 0; g < GROUPS; g++)
                for (int i = 0; i < STAGES && i * GROUPS + g < tiles; i++) fetch(g, i, what);
    }
    __syncwarp();

    float sum[32], s[AT_ONCE][32], top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f}, fade[2];
    if (!ONCE || !count)
#pragma unroll
        for (int i = 0; i < 32; i++) sum[i] = 0.0f;
    int mine = row + warp % 4 * 16 + lane / 4; // and 8 behind it
    u64 queries = TILE128(16) | AT(base);
    await(ready, 0);
    for (int begin = 0; begin < (ONCE ? min(count, 1) : count); begin += AT_ONCE) {
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++)
            if (begin + t < count) {
                int slot = (begin + t) % STAGES;
                u64 keys = TILE128(16) | AT(ring + slot * 2 * SIDE);
                await(keys0 + 8 * (group * STAGES + slot), (begin + t) / STAGES & 1);
                fence_registers();
#pragma unroll
                for (int j = 0; j < 4; j++) score(s[t], queries + j * (32 >> 4), keys + j * (32 >> 4), j > 0);
                commit();
            }
        await_products<0>();
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
            settled(s[t]);
            int key = ((begin + t) * GROUPS + group) * 64;
            bool cut = key + 64 > valid;
#if CAUSAL
            cut = cut || key + 63 > row + shift;
#endif
            if (cut) {
#pragma unroll
                for (int j = 0; j < 32; j++) {
                    int c = key + j / 4 * 8 + lane % 4 * 2 + j % 2;
                    bool hidden = c >= valid;
#if CAUSAL
                    hidden = hidden || c > mine + shift + j % 4 / 2 * 8;
#endif
                    if (hidden) s[t][j] = NONE;
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = top[h], parts[2] = {0.0f, 0.0f}, highest[4];
#pragma unroll
            for (int j = 0; j < 4; j++) highest[j] = NONE;
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    highest[j] = fmaxf(highest[j], fmaxf(fmaxf(s[t][8 * j + 2 * h], s[t][8 * j + 2 * h + 1]),
                                                         fmaxf(s[t][8 * j + 4 + 2 * h], s[t][8 * j + 5 + 2 * h])));
            now = fmaxf(fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3])), now);
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
            float off = now > NONE ? now * scale : 0.0f; // where all is hidden, all becomes 0
            fade[h] = ONCE ? 0.0f : power_of_two(top[h] * scale - off);
            top[h] = now;
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++)
#pragma unroll
                for (int j = 0; j < 16; j++) {
                    int e = j / 2 * 4 + 2 * h + j % 2;
                    s[t][e] = power_of_two(s[t][e] * scale - off);
                    parts[j % 2] += s[t][e];
                }
            total[h] = total[h] * fade[h] + parts[0] + parts[1];
        }
        if (!ONCE && begin > 0) {
#pragma unroll
            for (int j = 0; j < 32; j++) sum[j] *= fade[j / 2 % 2];
        }
        u32 weights[AT_ONCE][16];
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++)
#pragma unroll
            for (int j = 0; j < 16; j++) weights[t][j] = narrow2(s[t][2 * j], s[t][2 * j + 1]);
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++)
            if (begin + t < count) {
                int slot = (begin + t) % STAGES;
                u64 values = TILE128(16) | AT(ring + (slot * 2 + 1) * SIDE);
                await(values0 + 8 * (group * STAGES + slot), (begin + t) / STAGES & 1);
                fence_registers();
#pragma unroll
                for (int j = 0; j < 4; j++) weigh(sum, weights[t] + 4 * j, values + j * (16 * 128 >> 4), !ONCE || t + j > 0);
                commit();
            }
        await_products<0>();
        settled(sum);
        if (!ONCE && begin + STAGES < count) {
            asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); // all of the group have read these tiles
            if (threadIdx.x % 128 == 0)
                for (int i = begin + STAGES; i < begin + STAGES + AT_ONCE && i < count; i++) {
                    fetch(group, i, 1);
                    fetch(group, i, 2);
                }
        }
    }

    // Each group's mean of values, in halves, and what it weighs: the groups' are put together by all.
    u32 own = base + PARTS_AT + warp * 16 * ROW_BYTES + lane % 16 * ROW_BYTES + lane / 16 * 16;
    float by[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        by[h] = total[h] > 0.0f ? __fdividef(1.0f, total[h]) : 0.0f;
        if (lane % 4 == 0) met[group][warp % 4 * 16 + lane / 4 + 8 * h] = make_float2(top[h] * scale, total[h]);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(own + j * 16),
                     "r"(narrow2(sum[4 * j] * by[0], sum[4 * j + 1] * by[0])), "r"(narrow2(sum[4 * j + 2] * by[1], sum[4 * j + 3] * by[1])),
                     "r"(narrow2(sum[4 * j + 4] * by[0], sum[4 * j + 5] * by[0])), "r"(narrow2(sum[4 * j + 6] * by[1], sum[4 * j + 7] * by[1]))
                     : "memory");
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < 64 * 8; i += WORKERS) { // eight values of a query
        uint4 parts[GROUPS];
        float2 found[GROUPS];
        float now = NONE * scale, whole = 0.0f, all[8];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            found[g] = met[g][i / 8];
            parts[g] = shared_vector(base + PARTS_AT + (g * 64 + i / 8) * ROW_BYTES + i % 8 * 16);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) now = fmaxf(now, found[g].x);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) whole += found[g].y *= power_of_two(found[g].x - now);
        whole = whole > 0.0f ? __fdividef(1.0f, whole) : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) all[j] = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            float share = found[g].y * whole;
            u32 words[4] = {parts[g].x, parts[g].y, parts[g].z, parts[g].w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                all[2 * j] += wide((Bits)words[j]) * share;
                all[2 * j + 1] += wide((Bits)(words[j] >> 16)) * share;
            }
        }
        int y = row + i / 8;
        if (y < asked)
            put(out + ((u64)document * asked + y) * (heads * 64) + head * 64 + i % 8 * 8,
                make_uint4(narrow2(all[0], all[1]), narrow2(all[2], all[3]), narrow2(all[4], all[5]), narrow2(all[6], all[7])));
    }
}
#endif
