// Gradient norm and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch 2 computes them, on f32 tensors.
//
//   squared_norm   Σ x² in f64: `parts` partial sums, then their sum
//   adamw_step     g = scale · gradient;  w ← keep · w,  keep = 1 − lr · decay
//                  m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g²
//                  w ← w − rate · m / (sqrt(v) / root2 + ε),  rate = lr / (1 − β₁ᵗ),  root2 = sqrt(1 − β₂ᵗ)
//
// Bytes: 4 per element for the norm, 28 for AdamW (16 read, 12 written). Limited by memory.
//
// Decomposition: norm: block b takes packs b, b + parts, … of 256 · 8 elements, and one block adds the parts; the number of
// parts depends on the count alone, so the order of the sum does too. AdamW: a thread per pack of eight elements.
//
// Numerics: squares and sums in f64, where 2⁵³ of them lose nothing visible; the corrections come from the host, in f64.

#include "common.cuh"

constexpr i32 THREADS = 256;

ENTRY(THREADS) squared_norm_parts(const f32* __restrict__ x, f64* __restrict__ parts, i64 count) {
    f64 sum = 0.0;
    i64 stride = i64(gridDim.x) * THREADS * PACK;
    for (i64 first = global_thread() * PACK; first < count; first += stride) {
        Pack pack = load_pack(x, first, count, true);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum += f64(pack.at[i]) * f64(pack.at[i]);
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// Writes, or with `accumulate` adds, the sum of the parts to `norm[0]`.
ENTRY(THREADS) squared_norm_total(const f64* __restrict__ parts, f64* __restrict__ norm, i32 count, i32 accumulate) {
    f64 sum = 0.0;
    for (i32 i = i32(threadIdx.x); i < count; i += THREADS) sum += parts[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) norm[0] = accumulate ? norm[0] + sum : sum;
}

ENTRY(THREADS)
adamw_step(f32* __restrict__ parameter, const f32* __restrict__ gradient, f32* __restrict__ m, f32* __restrict__ v, i64 count,
           f32 gradient_scale, f32 keep, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2,
           f32 epsilon) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack w = load_pack(parameter, first, count, true);
    Pack g = load_pack(gradient, first, count, true);
    Pack mean = load_pack(m, first, count, true);
    Pack square = load_pack(v, first, count, true);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        f32 scaled = gradient_scale * g.at[i];
        mean.at[i] += one_minus_beta1 * (scaled - mean.at[i]);
        square.at[i] = beta2 * square.at[i] + one_minus_beta2 * scaled * scaled;
        w.at[i] = w.at[i] * keep - rate * mean.at[i] / (sqrtf(square.at[i]) / root2 + epsilon);
    }
    store_pack(parameter, first, count, true, w);
    store_pack(m, first, count, true, mean);
    store_pack(v, first, count, true, square);
}
