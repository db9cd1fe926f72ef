#if PRODUCT
// out = act(x w + bias): x (m, k), w (k, n). A block makes ROWS x COLUMNS of it, of one of gridDim.z parts of k, which stand one behind
// the other in out, with APART as PART of them: a warp each brings tiles of x and of w by TMA into a ring of STAGES, a warpgroup for
// every 64 rows multiplies them.
// COLUMNS is a multiple of 64, or else of 32.
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
#elif APART
    return x * PART;
#else
    return x;
#endif
}

extern "C" __global__ void __launch_bounds__(WORKERS + 64, 1)
    rmt_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const Bits *bias, Bits *out, int m, int n, int k) {
    extern __shared__ unsigned char raw[];
    __shared__ u64 full[STAGES], empty[STAGES];
    u32 base = (shared_of(raw) + 1023) & ~1023u, full0 = shared_of(full), empty0 = shared_of(empty);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y * ROWS, column = blockIdx.x * COLUMNS;
    int all = k / DEEP, part = blockIdx.z, parts = gridDim.z, first = all * part / parts, steps = all * (part + 1) / parts - first;

    if (warp == GROUPS * 4) { // brings weights, the first of them before what is before has ended
        if (elected()) {
            asm volatile("prefetch.tensormap [%0];" ::"l"(&w) : "memory");
#pragma unroll
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full0 + 8 * i, 1);
                barrier_init(empty0 + 8 * i, GROUPS * 4);
            }
            barriers_made();
        }
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"(WORKERS + 64) : "memory");
        if (elected())
            for (int i = 0; i < steps; i++) {
                u32 bar = full0 + 8 * (i % STAGES), to = base + i % STAGES * (X_BYTES + W_BYTES) + X_BYTES;
                if (i >= STAGES) await(empty0 + 8 * (i % STAGES), (i / STAGES - 1) & 1);
                expect(bar, X_BYTES + W_BYTES);
#pragma unroll
                for (int c = 0; c < COLUMNS / BOX; c++) bring(to + c * (BOX * DEEP * 2), &w, column + c * BOX, (first + i) * DEEP, bar);
            }
        return;
    }
    if (warp == GROUPS * 4 + 1) { // brings x
        if (lane == 0) asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
        __syncwarp();
        asm volatile("bar.sync 1, %0;" ::"n"(WORKERS + 64) : "memory");
        if (elected()) {
            await_the_one_before();
            next_may_start(); // the norm behind reads what was made before this product's input
            for (int i = 0; i < steps; i++) {
                if (i >= STAGES) await(empty0 + 8 * (i % STAGES), (i / STAGES - 1) & 1);
                bring(base + i % STAGES * (X_BYTES + W_BYTES), &x, (first + i) * DEEP, row, full0 + 8 * (i % STAGES));
            }
        }
        return;
    }

    u32 first_part = part ? 0 : ~0u;
    asm volatile("" : "+r"(first_part)); // with a condition in its place the compiler waits for every product
    float sum[COLUMNS / 2]; // begins as the bias, which nothing has to be waited for; that of the first part alone
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
        int c = column + j * 8 + lane % 4 * 2;
        u32 both = (c < n ? *(const u32 *)(bias + c) : 0) & first_part;
        sum[4 * j] = sum[4 * j + 2] = wide((Bits)both);
        sum[4 * j + 1] = sum[4 * j + 3] = wide((Bits)(both >> 16));
    }
    settled(sum); // each in a register of its own

    // Where the result goes is found now, while nothing is there to be multiplied. It is put behind the ring, from where whole rows are
    // written: 64 columns of one by eight lanes, what is left of 32 by four.
    int top = warp * 16, under = m - row - top - lane / 8, c = column + lane % 8 * 8;
    u32 made = base + STAGES * (X_BYTES + W_BYTES) + top * PITCH, own = made + lane % 16 * PITCH + lane / 16 * 16;
    u32 from = made + lane / 8 * PITCH + lane % 8 * 16;
    Bits *to = out + ((u64)part * m + row + top + lane / 8) * n + c;
    asm volatile("" : "+r"(under), "+r"(c), "+r"(own), "+r"(from), "+l"(to));
#if COLUMNS % 64
    int under_rest = m - row - top - lane / 4, c_rest = column + COLUMNS / 64 * 64 + lane % 4 * 8;
    u32 from_rest = made + lane / 4 * PITCH + COLUMNS / 64 * 128 + lane % 4 * 16;
    Bits *to_rest = out + ((u64)part * m + row + top + lane / 4) * n + c_rest;
    asm volatile("" : "+r"(under_rest), "+r"(c_rest), "+r"(from_rest), "+l"(to_rest));
#endif
    asm volatile("bar.sync 1, %0;" ::"n"(WORKERS + 64) : "memory");
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
    uint4 whole[COLUMNS / 16];
#pragma unroll
    for (int j = 0; j < COLUMNS / 64 * 4; j++) whole[j] = shared_vector(from + j % 4 * 4 * PITCH + j / 4 * 128);
#if COLUMNS % 64
#pragma unroll
    for (int j = 0; j < 2; j++) whole[COLUMNS / 64 * 4 + j] = shared_vector(from_rest + j * 8 * PITCH);
#endif
#pragma unroll
    for (int j = 0; j < COLUMNS / 64 * 4; j++)
        if (j % 4 * 4 < under && c + j / 4 * 64 < n) put(to + j % 4 * 4 * (u64)n + j / 4 * 64, whole[j]);
#if COLUMNS % 64
#pragma unroll
    for (int j = 0; j < 2; j++)
        if (j * 8 < under_rest && c_rest < n) put(to_rest + j * 8 * (u64)n, whole[COLUMNS / 64 * 4 + j]);
#endif
}
#endif
