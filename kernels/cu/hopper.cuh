// What Hopper (sm_90a) adds: barriers of shared memory that count bytes, the engine that copies boxes of tensors (TMA), and
// products by a warp group whose factors lie in shared memory (wgmma).
//
// Each wrapper has two bodies, as those of common.cuh. Sources that include this are compiled for sm_90a only; their twins for other
// targets are the portable kernels. Facts are those of the PTX ISA, chapters on mbarrier, cp.async.bulk.tensor and wgmma.

#pragma once
#include "common.cuh"

// A tensor in global memory as the copy engine sees it: extents, strides, box, swizzle. Made by the host (gpu/map.rs), given to
// kernels by value.
struct alignas(64) TensorMap {
    u64 words[16];
};
#define MAP const __grid_constant__ TensorMap

constexpr i32 WARP_GROUP = 128;
// Shared memory that swizzled boxes and the factors of wgmma begin at multiples of: where the pattern of 128 bytes repeats.
constexpr i32 SWIZZLE_REPEAT = 1024;

// ---- barriers ------------------------------------------------------------------------------------------------------
//
// A barrier's phase ends when as many arrivals were counted as it was made for and all bytes that were expected have come; the next
// one begins at once. `barrier_wait` waits until the phase of a parity has ended: 0 is the first phase, and a barrier that was just
// made lets those pass who wait for parity 1.

DEVICE void barrier_init(u64* barrier, i32 arrivals) {
#ifdef BRIGHTRUN_EMULATED
    emu::mbarrier_init(barrier, unsigned(arrivals));
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Shows barriers that this thread made to the copy engine. A block's barrier must follow for the other threads.
DEVICE void barriers_publish() {
#ifdef BRIGHTRUN_EMULATED
    emu::mbarriers_publish();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE void barrier_arrive(u64* barrier) {
#ifdef BRIGHTRUN_EMULATED
    emu::mbarrier_arrive(barrier, EMU_SITE);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Tells a barrier to wait for so many bytes more in this phase. Before the last arrival, or the phase may end without them.
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
#ifdef BRIGHTRUN_EMULATED
    emu::mbarrier_expect(barrier, bytes, EMU_SITE);
#else
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

DEVICE void barrier_wait(u64* barrier, u32 parity) {
#ifdef BRIGHTRUN_EMULATED
    emu::mbarrier_wait(barrier, parity, EMU_SITE);
#else
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra AGAIN;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// Waits for `threads` threads, a multiple of 32, at a numbered barrier of the block; 0 is __syncthreads'.
DEVICE void numbered_barrier(i32 number, i32 threads) {
#ifdef BRIGHTRUN_EMULATED
    emu::named_barrier(unsigned(number), unsigned(threads), true, EMU_SITE);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// ---- the copy engine -----------------------------------------------------------------------------------------------

// Begins to copy the box of a tensor at element (x, y, z) to shared memory, at a multiple of 128 bytes; its rows follow each other,
// chunks of 16 bytes exchanged as the map's swizzle says. Elements outside the tensor are zeros and count as bytes too. The barrier
// counts the box's bytes when they are there.
DEVICE void copy_box(void* shared, const TensorMap* map, i32 x, i32 y, i32 z, u64* barrier) {
#ifdef BRIGHTRUN_EMULATED
    emu::copy_box(shared, map, x, y, z, barrier, EMU_SITE);
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
#endif
}

// Fetches a map before its first use. One thread calls it.
DEVICE void prefetch_map(const TensorMap* map) {
#ifdef BRIGHTRUN_EMULATED
    (void)map;
#else
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// Shows what this thread wrote to shared memory by ordinary stores to wgmma and the copy engine.
DEVICE void show_to_engines() {
#ifdef BRIGHTRUN_EMULATED
    emu::proxy_fence();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- integers ------------------------------------------------------------------------------------------------------

// The bits moved towards the lowest by `by`, below 32, around the end.
DEVICE u32 rotated(u32 value, i32 by) {
#ifdef BRIGHTRUN_EMULATED
    return value >> by | value << (32 - by & 31);
#else
    return __funnelshift_r(value, value, by);
#endif
}

// ---- registers -----------------------------------------------------------------------------------------------------

// Gives registers back, or asks for more, up to COUNT a thread. All warps of a warp group call it.
template <i32 COUNT>
DEVICE void give_registers() {
#ifndef BRIGHTRUN_EMULATED
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <i32 COUNT>
DEVICE void take_registers() {
#ifndef BRIGHTRUN_EMULATED
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// ---- products of a warp group ---------------------------------------------------------------------------------------
//
// D [64, N] += A [64, 16] · B [16, N], bf16 factors and f32 sums. Warp w of the group has rows 16 w to 16 w + 16; within them
// lane l, with g = l / 4 and t = l % 4, holds
//   sum[4 j + 2 h + i]   (g + 8 h, 8 j + 2 t + i)
//   a[2 c + h]           (g + 8 h, 8 c + 2 t) and the element to the right, in the upper half
// The products run beside the thread. Registers of D and A may be touched again when `products_wait` says so, and shared memory that
// a product reads may be written again then.

// A factor in shared memory in the swizzle of 128 bytes: its rows have 64 elements, eight of them a group of 1024 bytes, and `next`
// bytes are between one group of eight rows and the next. Rows are those of A, columns those of B; or, for a transposed factor, each
// row is one index of the depth, and of a transposed B with more than 64 columns each further 64 are `across` bytes beyond. `at` is
// the first row's beginning.
DEVICE u64 factor(const void* at, i32 next, i32 across = 16) {
#ifdef BRIGHTRUN_EMULATED
    u64 address = emu::shared_offset(at);
#else
    u64 address = shared_address(at);
#endif
    return (address & 0x3ffff) >> 4 | u64(across >> 4) << 16 | u64(next >> 4) << 32 | u64(1) << 62;
}

// The same factor further along in shared memory: 32 bytes for the next 16 elements of its rows.
DEVICE u64 moved(u64 factor, i32 bytes) { return factor + u64(bytes >> 4); }

// Orders what this thread did to registers of D and A before the products that follow.
DEVICE void products_begin() {
#ifdef BRIGHTRUN_EMULATED
    emu::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// The same where several products follow whose left factors were all made before.
template <i32 STEPS>
DEVICE void products_begin(const u32 (&factors)[STEPS][4]) {
#ifdef BRIGHTRUN_EMULATED
    emu::wgmma_fence(factors[0], 4 * STEPS);
#else
    (void)factors;
    products_begin();
#endif
}

// Ends a group of products.
DEVICE void products_commit() {
#ifdef BRIGHTRUN_EMULATED
    emu::wgmma_commit(EMU_SITE);
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most LEFT groups are under way.
template <i32 LEFT>
DEVICE void products_wait() {
#ifdef BRIGHTRUN_EMULATED
    emu::wgmma_wait(LEFT, EMU_SITE);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

// Keeps the compiler from moving uses of the sums across this place.
template <i32 COUNT>
DEVICE void pin(f32 (&sum)[COUNT]) {
#ifndef BRIGHTRUN_EMULATED
#pragma unroll
    for (i32 i = 0; i < COUNT; i++) asm volatile("" : "+f"(sum[i])::"memory");
#endif
}

// `multiply_async(sum, a, b)` begins sum += A B with A in registers; `multiply_async<TRANSPOSED>(sum, a, b)` with A in shared
// memory, where `adds` false begins sum = A B. B is in shared memory, the depth along its rows, or, for `multiply_async_transposed`
// and `multiply_async<·, true>`, a row for each index of the depth.
#ifdef BRIGHTRUN_EMULATED

template <i32 COUNT>
DEVICE void multiply_async(f32 (&sum)[COUNT], const u32 (&a)[4], u64 b) {
    emu::wgmma({sum, COUNT, a, 0, b, false, false, true}, EMU_SITE);
}
template <i32 COUNT>
DEVICE void multiply_async_transposed(f32 (&sum)[COUNT], const u32 (&a)[4], u64 b) {
    emu::wgmma({sum, COUNT, a, 0, b, false, true, true}, EMU_SITE);
}
template <bool TRANSPOSED, bool RIGHT_TRANSPOSED = false, i32 COUNT>
DEVICE void multiply_async(f32 (&sum)[COUNT], u64 a, u64 b, bool adds = true) {
    emu::wgmma({sum, COUNT, nullptr, a, b, TRANSPOSED, RIGHT_TRANSPOSED, adds}, EMU_SITE);
}

#else

#define SUMS_8(i) \
    "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), "+f"(sum[i + 6]), \
        "+f"(sum[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define NAMES_24 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_32 NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_40 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_48 NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_64 \
    NAMES_48 "," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128 \
    NAMES_64 "," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define MULTIPLY_ASYNC(N, COUNT, SUMS, NAMES, P0, P1, P2, P3, P4, P5)                                                 \
    template <bool RIGHT_TRANSPOSED>                                                                                  \
    DEVICE void multiply_registers(f32 (&sum)[COUNT], const u32 (&a)[4], u64 b) {                                     \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\nwgmma.mma_async.sync.aligned.m64n" #N               \
                     "k16.f32.bf16.bf16 {" NAMES "}, {" P0 "," P1 "," P2 "," P3 "}, " P4 ", add, 1, 1, " P5 ";\n}"    \
                     : SUMS                                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(i32(RIGHT_TRANSPOSED))                 \
                     : "memory");                                                                                     \
    }                                                                                                                 \
    template <bool TRANSPOSED, bool RIGHT_TRANSPOSED = false>                                                         \
    DEVICE void multiply_async(f32 (&sum)[COUNT], u64 a, u64 b, bool adds = true) {                                   \
        asm volatile("{\n.reg .pred add;\nsetp.ne.s32 add, " P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N          \
                     "k16.f32.bf16.bf16 {" NAMES "}, " P0 ", " P1 ", add, 1, 1, " P3 ", " P4 ";\n}"                   \
                     : SUMS                                                                                           \
                     : "l"(a), "l"(b), "r"(i32(adds)), "n"(i32(TRANSPOSED)), "n"(i32(RIGHT_TRANSPOSED))               \
                     : "memory");                                                                                     \
    }
#define SUMS_24 SUMS_8(0), SUMS_8(8), SUMS_8(16)
MULTIPLY_ASYNC(48, 24, SUMS_24, NAMES_24, "%24", "%25", "%26", "%27", "%28", "%29")
MULTIPLY_ASYNC(64, 32, SUMS_32(0), NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37")
#define SUMS_40 SUMS_32(0), SUMS_8(32)
MULTIPLY_ASYNC(80, 40, SUMS_40, NAMES_40, "%40", "%41", "%42", "%43", "%44", "%45")
#define SUMS_48 SUMS_40, SUMS_8(40)
MULTIPLY_ASYNC(96, 48, SUMS_48, NAMES_48, "%48", "%49", "%50", "%51", "%52", "%53")
#define SUMS_64 SUMS_32(0), SUMS_32(32)
MULTIPLY_ASYNC(128, 64, SUMS_64, NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69")
#define SUMS_128 SUMS_64, SUMS_32(64), SUMS_32(96)
MULTIPLY_ASYNC(256, 128, SUMS_128, NAMES_128, "%128", "%129", "%130", "%131", "%132", "%133")

template <i32 COUNT>
DEVICE void multiply_async(f32 (&sum)[COUNT], const u32 (&a)[4], u64 b) {
    multiply_registers<false>(sum, a, b);
}
template <i32 COUNT>
DEVICE void multiply_async_transposed(f32 (&sum)[COUNT], const u32 (&a)[4], u64 b) {
    multiply_registers<true>(sum, a, b);
}

#endif

// ---- rings of stages ------------------------------------------------------------------------------------------------

// A place in the ring, and the parity of the phase it is in.
struct RingPlace {
    i32 slot = 0;
    u32 parity = 0;

    template <i32 STAGES>
    DEVICE void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};
