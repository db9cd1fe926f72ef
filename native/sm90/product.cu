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
