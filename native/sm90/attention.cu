#if ATTENTION
// Attention over heads of 64. A block takes 64 queries of a head; its GROUPS warpgroups take tiles of 64 keys and their values in turn,
// each by TMA into a ring of STAGES of its own, and put together what they found. While a tile's scores become weights, the values of
// the one before are summed.
#define SIDE 8192 // bytes of 64 rows of a head
#define WORKERS (GROUPS * 128)
#define NONE (-1e30f)
#define ROW_BYTES 288 // of 64 float32 of a query, with room so that no two lanes meet in a bank

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

static __device__ __forceinline__ void weigh(float (&d)[32], const u32 *weights, u64 values) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF " {" P0 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
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
    __shared__ u64 full[GROUPS][STAGES], empty[GROUPS][STAGES], asked_for;
    __shared__ float2 met[GROUPS][64];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    u32 base = (shared_of(raw) + 1023) & ~1023u, ring = base + SIDE + group * STAGES * 2 * SIDE;
    u32 full0 = shared_of(full[group]), empty0 = shared_of(empty[group]), ready = shared_of(&asked_for);
    int head = blockIdx.y, heads = gridDim.y, document = blockIdx.z, row = blockIdx.x * 64;
    bool brings = threadIdx.x % 128 == 0;
    next_may_start();
    if (threadIdx.x == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&rows) : "memory");
    if (brings) {
        if (group == 0) barrier_init(ready, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full0 + 8 * i, 1);
            barrier_init(empty0 + 8 * i, 4);
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
    int tiles = max(1, (end + 63) / 64);
    // The group's tile of this number, of all tiles number * GROUPS + group.
    auto fetch = [&](int number) {
        u32 bar = full0 + 8 * (number % STAGES), to = ring + number % STAGES * 2 * SIDE;
        int key = (number * GROUPS + group) * 64;
        expect(bar, 2 * SIDE);
        bring(to, &rows, (heads + head) * 64, key, document, bar);
        bring(to + SIDE, &rows, (2 * heads + head) * 64, key, document, bar);
    };
    int count = (tiles - group + GROUPS - 1) / GROUPS;
    if (brings) {
        if (group == 0) {
            expect(ready, SIDE);
            bring(base, &rows, head * 64, row + shift, document, ready);
        }
        for (int i = 0; i < STAGES && i < count; i++) fetch(i);
    }

    float sum[32], s[32], top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f}, fade[2];
    u32 weights[16];
#pragma unroll
    for (int i = 0; i < 32; i++) sum[i] = 0.0f;
    int mine = row + warp % 4 * 16 + lane / 4; // and 8 behind it
    auto ask = [&](int number) {
        u64 queries = TILE128(16) | AT(base), keys = TILE128(16) | AT(ring + number % STAGES * 2 * SIDE);
        await(full0 + 8 * (number % STAGES), (number / STAGES) & 1);
        fence_registers();
#pragma unroll
        for (int j = 0; j < 4; j++) score(s, queries + j * (32 >> 4), keys + j * (32 >> 4), j > 0);
        commit();
    };
    auto weigh_values = [&](int number) {
        u64 values = TILE128(16) | AT(ring + (number % STAGES * 2 + 1) * SIDE);
        fence_registers();
#pragma unroll
        for (int j = 0; j < 4; j++) weigh(sum, weights + 4 * j, values + j * (16 * 128 >> 4));
        commit();
    };
    auto raise = [&](int number) { // scores become powers of two
        int key = (number * GROUPS + group) * 64;
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
                if (hidden) s[j] = NONE;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = top[h], parts[2] = {0.0f, 0.0f}, highest[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                highest[j] = fmaxf(fmaxf(s[8 * j + 2 * h], s[8 * j + 2 * h + 1]), fmaxf(s[8 * j + 4 + 2 * h], s[8 * j + 5 + 2 * h]));
            now = fmaxf(fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3])), now);
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
            now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
            float off = now > NONE ? now * scale : 0.0f; // where all is hidden, all becomes 0
            fade[h] = power_of_two(top[h] * scale - off);
            top[h] = now;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                int e = j / 2 * 4 + 2 * h + j % 2;
                s[e] = power_of_two(s[e] * scale - off);
                parts[j % 2] += s[e];
            }
            total[h] = total[h] * fade[h] + parts[0] + parts[1];
        }
    };
    auto round = [&]() {
#pragma unroll
        for (int j = 0; j < 16; j++) weights[j] = narrow2(s[2 * j], s[2 * j + 1]);
    };
    await(ready, 0);
    if (count > 0) {
        ask(0);
        await_products<0>();
        settled(s);
        raise(0);
        round();
        for (int i = 1; i < count; i++) {
            ask(i);
            weigh_values(i - 1);
            await_products<1>(); // the scores, which were asked for first
            settled(s);
            raise(i);
            settled(s); // before what follows is waited for
            await_products<0>();
            settled(sum);
            if (i - 1 + STAGES < count) {
                u32 bar = empty0 + 8 * ((i - 1) % STAGES);
                if (lane == 0) arrive(bar);
                if (brings) {
                    await(bar, ((i - 1) / STAGES) & 1);
                    fetch(i - 1 + STAGES);
                }
                __syncwarp();
            }
#pragma unroll
            for (int j = 0; j < 32; j++) sum[j] *= fade[j / 2 % 2];
            round();
        }
        weigh_values(count - 1);
        await_products<0>();
        settled(sum);
    }

    // The groups' parts are put together where the tiles lay: all are used.
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        if (lane % 4 == 0) met[group][warp % 4 * 16 + lane / 4 + 8 * h] = make_float2(top[h], total[h]);
    }
    __syncthreads();
    unsigned char *place = raw + (base - shared_of(raw)), *own = place + (warp * 16 + lane / 4) * ROW_BYTES + lane % 4 * 8;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float now = NONE, all = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) now = fmaxf(now, met[g][warp % 4 * 16 + lane / 4 + 8 * h].x);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            float2 found = met[g][warp % 4 * 16 + lane / 4 + 8 * h];
            all += found.y * power_of_two((found.x - now) * scale);
        }
        float by = all > 0.0f ? __fdividef(power_of_two((top[h] - now) * scale), all) : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(float2 *)(own + h * 8 * ROW_BYTES + j * 32) = make_float2(sum[4 * j + 2 * h] * by, sum[4 * j + 2 * h + 1] * by);
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < 64 * 16; i += WORKERS) {
        float4 parts[GROUPS], all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) parts[g] = *(const float4 *)(place + (g * 64 + i / 16) * ROW_BYTES + i % 16 * 16);
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            all = make_float4(all.x + parts[g].x, all.y + parts[g].y, all.z + parts[g].z, all.w + parts[g].w);
        int y = row + i / 16;
        if (y < asked)
            *(uint2 *)(out + ((u64)document * asked + y) * (heads * 64) + head * 64 + i % 16 * 4) =
                make_uint2(narrow2(all.x, all.y), narrow2(all.z, all.w));
    }
}
#endif
