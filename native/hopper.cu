// Kernels for compute capability 9.0 (Hopper): products of few rows, attention over heads of 64, norms, a step's
// first rows. NVRTC compiles each with its sizes as macros, for sm_90a, when it is first run; BFLOAT says which half. PRODUCT, ATTENTION,
// NORM or EMBED names the one that is wanted.
//
// They are launched as programmatic dependents: a kernel starts while the one before still runs, brings what does not depend on it
// (weights, biases), and waits (griddepcontrol.wait) before it touches anything else.
//
// Sources: PTX ISA, sections on wgmma (shared memory layouts, descriptors), cp.async.bulk.tensor, mbarrier and griddepcontrol.

typedef unsigned short Bits;
typedef unsigned u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap {
    u64 opaque[16];
};

#if BFLOAT
#define HALF "bf16"
#else
#define HALF "f16"
#endif

static __device__ __forceinline__ float wide(Bits bits) {
#if BFLOAT
    return __uint_as_float((u32)bits << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

static __device__ __forceinline__ u32 narrow2(float low, float high) {
    u32 both;
#if BFLOAT
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// All blocks of the next kernel may start as soon as all of this one's have.
static __device__ __forceinline__ void next_may_start() { asm volatile("griddepcontrol.launch_dependents;"); }
static __device__ __forceinline__ void await_the_one_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#if PRODUCT || ATTENTION

static __device__ __forceinline__ u32 shared_of(const void *p) { return (u32)__cvta_generic_to_shared(p); }

static __device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
static __device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
static __device__ __forceinline__ void expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void await(u32 bar, u32 parity) {
    asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra AGAIN; }" ::"r"(bar), "r"(parity)
                 : "memory");
}

static __device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int under_way>
static __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(under_way) : "memory");
}

// Nothing reads these registers before what has been waited for, whatever the compiler moves.
template <int count>
static __device__ __forceinline__ void settled(float (&values)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++) asm volatile("" : "+f"(values[i]));
}

// Operands of asm: places, and registers.
#define P0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define P48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define F8(d, i)                                                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)

// What describes a tile to wgmma, but for its address: swizzled by 128 bytes, or by 64, groups of 8 rows one behind the other. `next`
// is how far the next columns are, where rows hold no more than a swizzle.
#define TILE128(next) ((u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)((next) >> 4) << 16)
#define TILE64(next) ((u64)2 << 62 | (u64)(512 >> 4) << 32 | (u64)((next) >> 4) << 16)
#define AT(address) ((u64)((address) >> 4 & 0x3fff))

#endif

#if PRODUCT
// out = act(x w + bias): x (m, k), w (k, n). A block makes ROWS x COLUMNS of it: one warp brings tiles by TMA into a ring of STAGES, a
// warpgroup for every 64 rows multiplies them. COLUMNS is a multiple of 64, or else of 32.
#define DEEP 64 // of k in a tile
#define GROUPS (ROWS / 64)
#define WORKERS (GROUPS * 128)
#define BOX (COLUMNS % 64 ? 32 : 64) // columns of w that are brought at once: as many as a swizzle holds
#define X_BYTES (ROWS * DEEP * 2)
#define W_BYTES (COLUMNS * DEEP * 2)
#define PITCH (COLUMNS * 2 + 16) // of a row of the result in shared memory: no two lanes meet in a bank

static __device__ __forceinline__ void multiply(float (&d)[COLUMNS / 2], u64 x, u64 w) {
#if COLUMNS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF " {" P0 "}, %32, %33, 1, 1, 1, 0, 1;"
                 : F32(d, 0)
                 : "l"(x), "l"(w));
#elif COLUMNS == 96
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32." HALF "." HALF " {" P0 P32 "}, %48, %49, 1, 1, 1, 0, 1;"
                 : F32(d, 0), F8(d, 32), F8(d, 40)
                 : "l"(x), "l"(w));
#elif COLUMNS == 128
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." HALF "." HALF " {" P0 P32 P48 "}, %64, %65, 1, 1, 1, 0, 1;"
                 : F32(d, 0), F32(d, 32)
                 : "l"(x), "l"(w));
#else
#error "no product of so many columns"
#endif
}

static __device__ __forceinline__ void bring(u32 to, const TensorMap *map, int x, int y, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(bar), "r"(x), "r"(y)
                 : "memory");
}

static __device__ __forceinline__ float activated(float x) {
#if GELU
    float t, u = x * (0.7978845608f + 0.0356774081f * x * x);
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(u));
    x *= 0.5f;
    return x + x * t;
#else
    return x;
#endif
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1)
    rmt_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const Bits *bias, Bits *out, int m, int n, int k) {
    extern __shared__ unsigned char raw[];
    __shared__ u64 full[STAGES], empty[STAGES];
    u32 base = (shared_of(raw) + 1023) & ~1023u, full0 = shared_of(full), empty0 = shared_of(empty);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y * ROWS, column = blockIdx.x * COLUMNS, steps = k / DEEP;
    next_may_start();

    if (warp == GROUPS * 4) {
        auto bring_w = [&](int i) {
            u32 bar = full0 + 8 * (i % STAGES), to = base + i % STAGES * (X_BYTES + W_BYTES) + X_BYTES;
            expect(bar, X_BYTES + W_BYTES);
#pragma unroll
            for (int c = 0; c < COLUMNS / BOX; c++) bring(to + c * (BOX * DEEP * 2), &w, column + c * BOX, i * DEEP, bar);
        };
        auto bring_x = [&](int i) {
            bring(base + i % STAGES * (X_BYTES + W_BYTES), &x, i * DEEP, row, full0 + 8 * (i % STAGES));
        };
        if (lane == 0) {
            asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full0 + 8 * i, 1);
                barrier_init(empty0 + 8 * i, GROUPS * 4);
            }
            barriers_made();
            for (int i = 0; i < STAGES && i < steps; i++) bring_w(i);
        }
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"(WORKERS + 32) : "memory");
        if (lane == 0) {
            await_the_one_before();
            for (int i = 0; i < STAGES && i < steps; i++) bring_x(i);
            for (int i = STAGES; i < steps; i++) {
                await(empty0 + 8 * (i % STAGES), (i / STAGES - 1) & 1);
                bring_w(i);
                bring_x(i);
            }
        }
        return;
    }

    float sum[COLUMNS / 2]; // begins as the bias, which nothing has to be waited for
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
        int c = column + j * 8 + lane % 4 * 2;
        u32 both = c < n ? *(const u32 *)(bias + c) : 0;
        sum[4 * j] = sum[4 * j + 2] = wide((Bits)both);
        sum[4 * j + 1] = sum[4 * j + 3] = wide((Bits)(both >> 16));
    }
    settled(sum); // each in a register of its own
    asm volatile("bar.sync 1, %0;" ::"n"(WORKERS + 32) : "memory");
    for (int i = 0; i < steps; i++) {
        u32 at = base + i % STAGES * (X_BYTES + W_BYTES);
        await(full0 + 8 * (i % STAGES), (i / STAGES) & 1);
        u64 left = TILE128(16) | AT(at + warp / 4 * (64 * DEEP * 2));
        u64 right = (BOX == 64 ? TILE128(BOX * DEEP * 2) : TILE64(BOX * DEEP * 2)) | AT(at + X_BYTES);
        fence_registers();
#pragma unroll
        for (int j = 0; j < DEEP / 16; j++) multiply(sum, left + j * (32 >> 4), right + j * (16 * BOX * 2 >> 4));
        commit();
        await_products<1>();
        if (i > 0 && lane == 0) arrive(empty0 + 8 * ((i - 1) % STAGES));
    }
    await_products<0>();
    settled(sum);

    // Behind the ring is a place for the result, from where whole rows are written.
    int first = warp * 16;
    unsigned char *made = raw + (base - shared_of(raw)) + STAGES * (X_BYTES + W_BYTES) + first * PITCH;
    u32 own = shared_of(made) + lane % 16 * PITCH + lane / 16 * 16;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
        u32 parts[4];
#pragma unroll
        for (int i = 0; i < 4; i++) parts[i] = narrow2(activated(sum[4 * j + 2 * i]), activated(sum[4 * j + 2 * i + 1]));
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(own + j * 16), "r"(parts[0]), "r"(parts[1]),
                     "r"(parts[2]), "r"(parts[3])
                     : "memory");
    }
    __syncwarp();
    constexpr int vectors = COLUMNS / 8, each = 16 * vectors / 32;
    uint4 whole[each];
#pragma unroll
    for (int i = 0; i < each; i++) {
        int y = (lane + 32 * i) / vectors, c = (lane + 32 * i) % vectors;
        whole[i] = *(const uint4 *)(made + y * PITCH + c * 16);
    }
#pragma unroll
    for (int i = 0; i < each; i++) {
        int y = row + first + (lane + 32 * i) / vectors, c = column + (lane + 32 * i) % vectors * 8;
        if (y < m && c < n) *(uint4 *)(out + (u64)y * n + c) = whole[i];
    }
}
#endif

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
