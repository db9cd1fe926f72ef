// Kernels for compute capability 9.0 (Hopper): products of few rows, attention over heads of 64, norms, a step's
// first rows. NVRTC compiles each with its sizes as macros, for sm_90a, when it is first run; BFLOAT says which half. PRODUCT, ATTENTION,
// NORM or EMBED names the one that is wanted.
//
// They are launched as programmatic dependents: a kernel starts while the one before still runs, brings what does not depend on it
// (weights, biases), and waits (griddepcontrol.wait) before it touches anything else, but for the residual of a norm, which says why.
// A product lets the next one start when it has waited itself, the others at once.
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

// All blocks of the next kernel may start as soon as all of this one's have said so.
static __device__ __forceinline__ void next_may_start() { asm volatile("griddepcontrol.launch_dependents;"); }
static __device__ __forceinline__ void await_the_one_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Parts of a product are halves of a sixteenth of them, so that they may be up to a million where their sum is small again.
#define PART 0.0625f

#if PRODUCT || ATTENTION

static __device__ __forceinline__ u32 shared_of(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// One lane of a warp, of which the compiler knows that it is alone.
static __device__ __forceinline__ bool elected() {
    u32 it;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(it));
    return it;
}

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

static __device__ __forceinline__ uint4 shared_vector(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
static __device__ __forceinline__ void put(Bits *at, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
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
