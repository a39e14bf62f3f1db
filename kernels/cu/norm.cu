// RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467) of each row of x [N, C].
//
//   rstd = 1 / sqrt(mean(x²) + eps)         y  = x · rstd · f,  f = w (plain) or 1 + w (zero-centred)
//   add: x ← x + added first                 the residual stream, which the norm then reads as it is stored
//   g    = dy · f                            dx = rstd · (g − x · rstd² · mean(g · x))
//
// Tensors: x, y, dy, dx [N, C] activations; w [C] f32 or bf16; rstd [N] f32. dx replaces or is added to what is there.
//
// Bytes, for activations of s bytes: 2 s N C forward, 4 s N C with the sum (5 s in two launches), 3 s N C backward (4 s with
// accumulation). Limited by memory.
//
// Decomposition: GROUP threads share a row: a warp up to C = 1024 (head norms have C = 128: eight rows a block, no barrier),
// a block of 256 beyond. A thread takes packs of eight elements GROUP · 8 apart. Each pass reads x again; a row of 2048 bf16
// elements is 4 KB, which the first level of cache still holds.
//
// Numerics: squares and products are summed in f32, a thread's own in rising order and then over the threads as a tree: the
// order depends on C alone. Rows whose length is not a multiple of 8 are not aligned and are read element by element.

#include "common.cuh"

constexpr i32 THREADS = 256;

// This thread's row, its place among the GROUP threads of the row, and whether the row exists.
template <i32 GROUP>
DEVICE bool find_row(i64 rows, i64& row, i32& member) {
    row = i64(blockIdx.x) * (THREADS / GROUP) + i32(threadIdx.x) / GROUP;
    member = i32(threadIdx.x) % GROUP;
    return row < rows;  // the same for a whole group: a block-wide group is one row
}

template <class W>
DEVICE Pack load_factors(const W* weight, i32 first, i32 width, bool aligned, i32 zero_centred) {
    Pack factor = load_pack(weight, first, width, aligned);
    if (zero_centred) {
#pragma unroll
        for (i32 i = 0; i < PACK; i++) factor.at[i] += 1.0f;
    }
    return factor;
}

// y = x · rstd · f for a row whose squares the group's threads have summed, each its own; *rstd is set.
template <i32 GROUP, class A, class W>
DEVICE void normalise(const A* x, const W* weight, A* y, f32* rstd, f32 squares, i32 member, i32 width, bool aligned, f32 eps,
                      i32 zero_centred) {
    f32 r = 1.0f / sqrtf(group_sum<GROUP>(squares) / f32(width) + eps);
    if (member == 0) *rstd = r;
    for (i32 first = member * PACK; first < width; first += GROUP * PACK) {
        Pack pack = load_pack(x, first, width, aligned);
        Pack factor = load_factors(weight, first, width, aligned, zero_centred);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] = pack.at[i] * r * factor.at[i];
        store_pack(y, first, width, aligned, pack);
    }
}

template <i32 GROUP, class A, class W>
DEVICE void rms_norm_forward(const A* x, const W* weight, A* y, f32* rstd, i64 rows, i32 width, f32 eps, i32 zero_centred) {
    i64 row;
    i32 member;
    if (!find_row<GROUP>(rows, row, member)) return;
    bool aligned = width % PACK == 0;
    x += row * width, y += row * width;
    f32 squares = 0.0f;
    for (i32 first = member * PACK; first < width; first += GROUP * PACK) {
        Pack pack = load_pack(x, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) squares += pack.at[i] * pack.at[i];
    }
    normalise<GROUP>(x, weight, y, rstd + row, squares, member, width, aligned, eps, zero_centred);
}

// x ← x + added, and the norm of what was stored. Each thread reads again what it wrote itself.
template <i32 GROUP, class A, class W>
DEVICE void add_rms_norm_forward(A* x, const A* added, const W* weight, A* y, f32* rstd, i64 rows, i32 width, f32 eps,
                                 i32 zero_centred) {
    i64 row;
    i32 member;
    if (!find_row<GROUP>(rows, row, member)) return;
    bool aligned = width % PACK == 0;
    x += row * width, added += row * width, y += row * width;
    f32 squares = 0.0f;
    for (i32 first = member * PACK; first < width; first += GROUP * PACK) {
        Pack pack = load_pack(x, first, width, aligned), more = load_pack(added, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            pack.at[i] = rounded<A>(pack.at[i] + more.at[i]);
            squares += pack.at[i] * pack.at[i];
        }
        store_pack(x, first, width, aligned, pack);
    }
    normalise<GROUP>(x, weight, y, rstd + row, squares, member, width, aligned, eps, zero_centred);
}

template <i32 GROUP, class A, class W>
DEVICE void rms_norm_backward(const A* x, const W* weight, const f32* rstd, const A* dy, A* dx, i64 rows, i32 width,
                              i32 zero_centred, i32 accumulate) {
    i64 row;
    i32 member;
    if (!find_row<GROUP>(rows, row, member)) return;
    bool aligned = width % PACK == 0;
    x += row * width, dy += row * width, dx += row * width;
    f32 dot = 0.0f;
    for (i32 first = member * PACK; first < width; first += GROUP * PACK) {
        Pack pack = load_pack(x, first, width, aligned);
        Pack gradient = load_pack(dy, first, width, aligned);
        Pack factor = load_factors(weight, first, width, aligned, zero_centred);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) dot += gradient.at[i] * factor.at[i] * pack.at[i];
    }
    f32 r = rstd[row];
    f32 pull = r * r * (group_sum<GROUP>(dot) / f32(width));
    for (i32 first = member * PACK; first < width; first += GROUP * PACK) {
        Pack pack = load_pack(x, first, width, aligned);
        Pack gradient = load_pack(dy, first, width, aligned);
        Pack factor = load_factors(weight, first, width, aligned, zero_centred);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) gradient.at[i] = r * (gradient.at[i] * factor.at[i] - pack.at[i] * pull);
        if (accumulate) {
            Pack old = load_pack(dx, first, width, aligned);
#pragma unroll
            for (i32 i = 0; i < PACK; i++) gradient.at[i] += old.at[i];
        }
        store_pack(dx, first, width, aligned, gradient);
    }
}

#define RMS_NORM(layout, GROUP, A, W)                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    rms_norm_forward_##layout##_##A##_##W(const A* __restrict__ x, const W* __restrict__ weight, A* __restrict__ y,         \
                                          f32* __restrict__ rstd, i64 rows, i32 width, f32 eps, i32 zero_centred) {         \
        rms_norm_forward<GROUP, A, W>(x, weight, y, rstd, rows, width, eps, zero_centred);                                  \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    add_rms_norm_forward_##layout##_##A##_##W(A* __restrict__ x, const A* __restrict__ added, const W* __restrict__ weight, \
                                              A* __restrict__ y, f32* __restrict__ rstd, i64 rows, i32 width, f32 eps,      \
                                              i32 zero_centred) {                                                           \
        add_rms_norm_forward<GROUP, A, W>(x, added, weight, y, rstd, rows, width, eps, zero_centred);                       \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    rms_norm_backward_##layout##_##A##_##W(const A* __restrict__ x, const W* __restrict__ weight,                           \
                                           const f32* __restrict__ rstd, const A* __restrict__ dy, A* __restrict__ dx,      \
                                           i64 rows, i32 width, i32 zero_centred, i32 accumulate) {                         \
        rms_norm_backward<GROUP, A, W>(x, weight, rstd, dy, dx, rows, width, zero_centred, accumulate);                     \
    }
RMS_NORM(rowwarp, 32, f32, f32)
RMS_NORM(rowwarp, 32, f32, bf16)
RMS_NORM(rowwarp, 32, bf16, f32)
RMS_NORM(rowwarp, 32, bf16, bf16)
RMS_NORM(rowblock, 256, f32, f32)
RMS_NORM(rowblock, 256, f32, bf16)
RMS_NORM(rowblock, 256, bf16, f32)
RMS_NORM(rowblock, 256, bf16, bf16)
