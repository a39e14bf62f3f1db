// Kernels with one mistake each, which the emulation must find, and some without.

#include "common.cuh"

constexpr i32 THREADS = 64;

// Right: reverses the first 64 elements through shared memory.
ENTRY(THREADS) reverse(f32* __restrict__ x) {
    SHARED(f32, kept, THREADS);
    i32 i = i32(threadIdx.x);
    kept[i] = x[i];
    __syncthreads();
    x[i] = kept[THREADS - 1 - i];
}

// Right: C [16, 8] = A [16, 16] · B on tensor cores, with B [16, 8], or its transpose B [8, 16], through shared memory. One warp
// works; copies are asynchronous.
template <bool TRANSPOSED>
DEVICE void product(const bf16* a, const bf16* b, f32* c) {
    SHARED(bf16, a_tile, 16 * 16);
    SHARED(bf16, b_tile, 16 * 8);
    i32 lane = i32(threadIdx.x);
    copy_async(a_tile + lane * 8, a + lane * 8, 16);
    if (lane < 16) copy_async(b_tile + lane * 8, b + lane * 8, 16);
    copies_commit();
    copies_wait<0>();
    __syncwarp();
    u32 left[4], both[4];
    load_matrices(left, a_tile + lane % 16 * 16 + lane / 16 * 8);
    if constexpr (TRANSPOSED) {
        load_matrices(both, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
    } else {
        load_matrices_transposed(both, b_tile + lane % 16 * 8);
    }
    u32 right[2] = {both[0], both[1]};
    f32 sum[4] = {};
    multiply_add(sum, left, right);
    f32* to = c + lane / 4 * 8 + lane % 4 * 2;
    to[0] = sum[0], to[1] = sum[1], to[64] = sum[2], to[65] = sum[3];
}

ENTRY(32) product_nn(const bf16* __restrict__ a, const bf16* __restrict__ b, f32* __restrict__ c) { product<false>(a, b, c); }
ENTRY(32) product_nt(const bf16* __restrict__ a, const bf16* __restrict__ b, f32* __restrict__ c) { product<true>(a, b, c); }

// An asynchronous copy that is used before it was waited for.
ENTRY(THREADS) no_wait(f32* __restrict__ x) {
    SHARED(f32, kept, 4 * THREADS);
    i32 i = i32(threadIdx.x) * 4;
    if (i < THREADS) copy_async(kept + i, x + i, 16);
    copies_commit();
    __syncthreads();
    x[threadIdx.x] = kept[threadIdx.x];
}

// `reverse` without its barrier.
ENTRY(THREADS) no_barrier(f32* __restrict__ x) {
    SHARED(f32, kept, THREADS);
    i32 i = i32(threadIdx.x);
    kept[i] = x[i];
    x[i] = kept[THREADS - 1 - i];
}

ENTRY(THREADS) past_the_end(f32* __restrict__ x, i32 at) { x[at] = 1.0f; }

ENTRY(THREADS) before_the_beginning(const f32* __restrict__ x, f32* __restrict__ y) { y[0] = x[-1024]; }

ENTRY(THREADS) half_a_barrier(f32* __restrict__ x) {
    if (threadIdx.x < 32) __syncthreads();
    x[threadIdx.x] = 0.0f;
}

ENTRY(THREADS) two_barriers(f32* __restrict__ x) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 0.0f;
}

ENTRY(THREADS) half_a_warp(f32* __restrict__ x) {
    if (threadIdx.x % 32 < 16) x[threadIdx.x] = warp_sum(1.0f);
}

ENTRY(THREADS) unwritten_shared(f32* __restrict__ x) {
    SHARED(f32, kept, THREADS);
    x[threadIdx.x] = kept[threadIdx.x];
}

ENTRY(THREADS) past_a_shared_array(f32* __restrict__ x) {
    SHARED(f32, kept, 32);
    kept[threadIdx.x % 33] = 0.0f;
    x[threadIdx.x] = 0.0f;
}

ENTRY(THREADS) too_much_shared(f32* __restrict__ x) {
    SHARED(f32, kept, 16 * 1024);
    kept[threadIdx.x] = 0.0f;
    x[threadIdx.x] = kept[threadIdx.x];
}

// A vector access one element off its alignment.
ENTRY(THREADS) misaligned(f32* __restrict__ x) {
    Pack pack;
    load_wide(pack, x + 1);
    x[threadIdx.x] = pack.at[threadIdx.x % PACK];
}

ENTRY(THREADS) index_outside(f32* __restrict__ x, i32 at) {
    f32 kept[8] = {};
    kept[at] = x[threadIdx.x];
    x[threadIdx.x] = kept[at / 2];
}
