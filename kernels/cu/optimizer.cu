// Gradient norm and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch 2 computes them, on f32 tensors.
//
//   squared_norm   Σ x² in f64: `parts` partial sums, then their sum
//   adamw_step     g = scale · gradient;  w ← keep · w,  keep = 1 − lr · decay
//                  m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g²
//                  w ← w − rate · m / (sqrt(v) / root2 + ε),  rate = lr / (1 − β₁ᵗ),  root2 = sqrt(1 − β₂ᵗ)
//   adamw_8bit_step   the same with m and v as codes of bitsandbytes' dynamic maps, one scale for 256 elements:
//                  value = map[code] · absmax;  code = the nearest of the map to value / absmax, the lower of two
//
// Bytes: 4 per element for the norm, 28 for AdamW (16 read, 12 written), 16 in 8 bits (10 read, 6 written). Limited by memory.
//
// Decomposition: norm: block b takes packs b, b + parts, … of 256 · 8 elements, and one block adds the parts; the number of
// parts depends on the count alone, so the order of the sum does too. AdamW: a thread per pack of eight elements; in 8
// bits a block of threads per block of 256 elements, a thread per element, which finds its codes by eight bisections in a map
// that lies in shared memory.
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

struct Step {
    f32 gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon;
};

DEVICE void advance(f32& w, f32 g, f32& mean, f32& square, const Step& step) {
    f32 scaled = step.gradient_scale * g;
    mean += step.one_minus_beta1 * (scaled - mean);
    square = step.beta2 * square + step.one_minus_beta2 * scaled * scaled;
    w = w * step.keep - step.rate * mean / (sqrtf(square) / step.root2 + step.epsilon);
}

ENTRY(THREADS)
adamw_step(f32* __restrict__ parameter, const f32* __restrict__ gradient, f32* __restrict__ m, f32* __restrict__ v, i64 count,
           f32 gradient_scale, f32 keep, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2,
           f32 epsilon) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Step step = {gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon};
    Pack w = load_pack(parameter, first, count, true);
    Pack g = load_pack(gradient, first, count, true);
    Pack mean = load_pack(m, first, count, true);
    Pack square = load_pack(v, first, count, true);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) advance(w.at[i], g.at[i], mean.at[i], square.at[i], step);
    store_pack(parameter, first, count, true, w);
    store_pack(m, first, count, true, mean);
    store_pack(v, first, count, true, square);
}

constexpr i32 MAP = 256;

// The code of the value of an ascending map that is nearest to x.
DEVICE i32 nearest(const f32* map, f32 x) {
    i32 above = 0;  // the number of values below x
#pragma unroll
    for (i32 half = MAP / 2; half > 0; half /= 2) above += map[above + half - 1] < x ? half : 0;
    above += above == MAP - 1 && map[above] < x;
    i32 below = above > 0 ? above - 1 : 0;
    return above == MAP || x - map[below] <= map[above] - x ? below : above;
}

// `maps`: the signed map and the unsigned one, 256 values each. Writes the codes of a block and its scale.
DEVICE void encode_moment(const f32* map, f32 value, i32 least, bool is_there, u8* codes, f32* absmax, i64 element) {
    f32 magnitude = block_max<THREADS>(is_there ? fabsf(value) : 0.0f);
    if (threadIdx.x == 0) absmax[blockIdx.x] = magnitude;
    i32 code = nearest(map, value / (magnitude == 0.0f ? 1.0f : magnitude));
    if (value > 0.0f && code < least) code = least;
    if (is_there) codes[element] = u8(code);
}

ENTRY(THREADS)
adamw_8bit_step(f32* __restrict__ parameter, const f32* __restrict__ gradient, u8* __restrict__ m_codes,
                f32* __restrict__ m_absmax, u8* __restrict__ v_codes, f32* __restrict__ v_absmax, const f32* __restrict__ maps,
                i64 count, f32 gradient_scale, f32 keep, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2,
                f32 epsilon) {
    SHARED(f32, map, 2 * MAP);
    for (i32 i = i32(threadIdx.x); i < 2 * MAP; i += THREADS) map[i] = maps[i];
    __syncthreads();
    i64 element = global_thread();
    bool is_there = element < count;
    Step step = {gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon};
    f32 mean = 0.0f, square = 0.0f;
    if (is_there) {
        f32 w = parameter[element];
        mean = map[m_codes[element]] * m_absmax[blockIdx.x];
        square = map[MAP + v_codes[element]] * v_absmax[blockIdx.x];
        advance(w, gradient[element], mean, square, step);
        parameter[element] = w;
    }
    encode_moment(map, mean, 0, is_there, m_codes, m_absmax, element);
    // A positive second moment stays positive.
    encode_moment(map + MAP, square, 1, is_there, v_codes, v_absmax, element);
}
