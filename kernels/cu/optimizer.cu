// Gradient norm and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch 2 computes them, on f32 tensors.
//
//   squared_norm   Σ x² in f64 over many tensors: a partial sum for every chunk, then their sum
//   adamw_step     g = scale · gradient;  w ← keep · w,  keep = 1 − lr · decay
//                  m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g²
//                  w ← w − rate · m / (sqrt(v) / root2 + ε),  rate = lr / (1 − β₁ᵗ),  root2 = sqrt(1 − β₂ᵗ)
//   adamw_8bit_step   the same with m and v as codes of bitsandbytes' dynamic maps, one scale for 256 elements:
//                  value = map[code] · absmax;  code = the nearest of the map to value / absmax, the lower of two
//   …_many         the same of many tensors in one launch; zero_many sets them to zero
//
// Bytes: 4 per element for the norm and for zeros, 28 for AdamW (16 read, 12 written), 16 in 8 bits (10 read, 6 written).
// Limited by memory; in 8 bits nearly as much by issue: four divisions and a root an element.
//
// Decomposition: a block of threads does a chunk of 4096 elements of one tensor. With many tensors it finds its row of
// addresses and its chunk in a list: an adapter has hundreds of tensors, most of less than a hundred chunks, and launches of
// their own would each fill a tenth of a device. A thread has packs of eight elements, a warp a pass of 256: in 8 bits these
// are the elements that share a scale, so that finding it needs no barrier. The norm's sums have an order that depends on
// the tensors' sizes alone.
//
// The nearest of 256 values is found by eight comparisons with what divides their neighbours, in a tree whose levels lie one
// after the other in shared memory (`dynamic::tree`). The lanes of a warp are at one level at a time: to the sixth their nodes
// are in different banks, then two and four share one. Halving the ordered list would put all of a level in one bank or two.
//
// Numerics: squares and sums in f64, where 2⁵³ of them lose nothing visible; the corrections come from the host, in f64. Each
// operation of an update is named, so that every entry rounds alike: many tensors at once have the bits of one by one.

#include "common.cuh"

constexpr i32 THREADS = 256;
constexpr i32 WARPS = THREADS / WARP_LANES;
// Elements of a tensor that a block does.
constexpr i32 CHUNK = 4096;
// Elements with a common scale: a pack of every lane.
constexpr i32 SCALED = WARP_LANES * PACK;

// Rows of addresses, one for each tensor or parameter; `gpu/addresses.rs` writes them.
struct Summed {
    const f32* x;
    i64 count;
};
struct Cleared {
    f32* x;
    i64 count;
};
struct Single {
    f32* parameter;
    const f32* gradient;
    f32* m;
    f32* v;
    i64 count;
};
struct Blocks {
    f32* parameter;
    const f32* gradient;
    u8* m_codes;
    f32* m_absmax;
    u8* v_codes;
    f32* v_absmax;
    i64 count;
};

// What this block does of a list of many tensors: a row, and its elements from `first` on.
struct Part {
    i32 row;
    i64 first;
};
DEVICE Part part_of(const i32* chunks) {
    i64 at = 2 * i64(blockIdx.x);
    return {chunks[at], i64(chunks[at + 1]) * CHUNK};
}
DEVICE i64 chunk_end(i64 first, i64 count) { return first + CHUNK < count ? first + CHUNK : count; }

// `chunks` has two numbers for each block: the row, and which chunk of it.
ENTRY(THREADS)
squared_norm_parts(const Summed* __restrict__ rows, const i32* __restrict__ chunks, f64* __restrict__ parts) {
    Part part = part_of(chunks);
    Summed row = rows[part.row];
    i64 end = chunk_end(part.first, row.count);
    f64 sum = 0.0;
    for (i64 at = part.first + i64(threadIdx.x) * PACK; at < end; at += THREADS * PACK) {
        Pack pack = load_pack(row.x, at, row.count, true);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum += f64(pack.at[i]) * f64(pack.at[i]);
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One block writes the sum of the parts.
ENTRY(THREADS) squared_norm_total(const f64* __restrict__ parts, f64* __restrict__ norm, i64 count) {
    f64 sum = 0.0;
    for (i64 i = i64(threadIdx.x); i < count; i += THREADS) sum += parts[i];
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) norm[0] = sum;
}

ENTRY(THREADS) zero_many(const Cleared* __restrict__ rows, const i32* __restrict__ chunks) {
    Part part = part_of(chunks);
    Cleared row = rows[part.row];
    i64 end = chunk_end(part.first, row.count);
    for (i64 at = part.first + i64(threadIdx.x) * PACK; at < end; at += THREADS * PACK)
        store_pack(row.x, at, row.count, true, Pack{});
}

struct Step {
    f32 gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon;
};

DEVICE void advance(f32& w, f32 g, f32& mean, f32& square, const Step& step) {
    f32 scaled = __fmul_rn(step.gradient_scale, g);
    mean = __fmaf_rn(step.one_minus_beta1, __fsub_rn(scaled, mean), mean);
    square = __fmaf_rn(step.beta2, square, __fmul_rn(__fmul_rn(step.one_minus_beta2, scaled), scaled));
    f32 divisor = __fadd_rn(__fdiv_rn(__fsqrt_rn(square), step.root2), step.epsilon);
    w = __fmaf_rn(w, step.keep, -__fdiv_rn(__fmul_rn(step.rate, mean), divisor));
}

DEVICE void step_chunk(const Single& row, i64 first, const Step& step) {
    i64 end = chunk_end(first, row.count);
    for (i64 at = first + i64(threadIdx.x) * PACK; at < end; at += THREADS * PACK) {
        Pack w = load_pack(row.parameter, at, row.count, true);
        Pack g = load_pack(row.gradient, at, row.count, true);
        Pack mean = load_pack(row.m, at, row.count, true);
        Pack square = load_pack(row.v, at, row.count, true);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) advance(w.at[i], g.at[i], mean.at[i], square.at[i], step);
        store_pack(row.parameter, at, row.count, true, w);
        store_pack(row.m, at, row.count, true, mean);
        store_pack(row.v, at, row.count, true, square);
    }
}

ENTRY(THREADS)
adamw_step(f32* __restrict__ parameter, const f32* __restrict__ gradient, f32* __restrict__ m, f32* __restrict__ v, i64 count,
           f32 gradient_scale, f32 keep, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2,
           f32 epsilon) {
    Step step = {gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon};
    step_chunk({parameter, gradient, m, v, count}, i64(blockIdx.x) * CHUNK, step);
}

ENTRY(THREADS)
adamw_step_many(const Single* __restrict__ rows, const i32* __restrict__ chunks, f32 gradient_scale, f32 keep,
                f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2, f32 epsilon) {
    Step step = {gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon};
    Part part = part_of(chunks);
    step_chunk(rows[part.row], part.first, step);
}

// ---- moments in 8 bits ----------------------------------------------------------------------------------------------

constexpr i32 CODES = 256;

// A map's values by code, and the tree of what divides them.
struct Map {
    const f32* values;
    const f32* tree;
};

// Eight codes, the first in the lowest byte; zero beyond the end.
DEVICE u64 load_codes(const u8* codes, i64 first, i64 count) {
    if (first + PACK <= count) return *reinterpret_cast<const u64*>(codes + first);
    u64 bits = 0;
    for (i32 i = 0; i < PACK; i++)
        if (first + i < count) bits |= u64(codes[first + i]) << 8 * i;
    return bits;
}

DEVICE void store_codes(u8* codes, i64 first, i64 count, u64 bits) {
    if (first + PACK <= count) {
        *reinterpret_cast<u64*>(codes + first) = bits;
        return;
    }
    for (i32 i = 0; i < PACK; i++)
        if (first + i < count) codes[first + i] = u8(bits >> 8 * i);
}

// The values of codes at `first`; zero beyond the end.
DEVICE Pack decoded(const Map& map, u64 codes, f32 absmax, i64 first, i64 count) {
    Pack pack;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) pack.at[i] = first + i < count ? map.values[codes >> 8 * i & 255] * absmax : 0.0f;
    return pack;
}

// The codes of a warp's values, those above 0 at least `least`, and their scale. NaN is passed over in the scale.
DEVICE u64 encoded(const Map& map, const Pack& pack, i32 least, f32& absmax) {
    absmax = 0.0f;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) absmax = fabsf(pack.at[i]) > absmax ? fabsf(pack.at[i]) : absmax;
    absmax = warp_max(absmax);
    f32 divisor = absmax == 0.0f ? 1.0f : absmax;
    f32 share[PACK];
    i32 place[PACK];  // bytes from the beginning of a level
#pragma unroll
    for (i32 i = 0; i < PACK; i++) share[i] = __fdiv_rn(pack.at[i], divisor), place[i] = 0;
#pragma unroll
    for (i32 level = 1; level < CODES; level *= 2)
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            const u8* nodes = reinterpret_cast<const u8*>(map.tree + level);
            i32 right = share[i] > *reinterpret_cast<const f32*>(nodes + place[i]) ? i32(sizeof(f32)) : 0;
            place[i] = opaque(2 * place[i] + right);  // one number, not an address and an index beside each other
        }
    u64 codes = 0;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        i32 code = i32(u32(place[i]) / sizeof(f32));
        codes |= u64(u32(pack.at[i] > 0.0f && code < least ? least : code)) << 8 * i;
    }
    return codes;
}

DEVICE void step_scaled(const Blocks& row, i64 begin, const Map& signed_map, const Map& unsigned_map, const Step& step) {
    i64 at = begin + lane_index() * PACK, scale = begin / SCALED;
    Pack w = load_pack(row.parameter, at, row.count, true);
    Pack g = load_pack(row.gradient, at, row.count, true);
    Pack mean = decoded(signed_map, load_codes(row.m_codes, at, row.count), row.m_absmax[scale], at, row.count);
    Pack square = decoded(unsigned_map, load_codes(row.v_codes, at, row.count), row.v_absmax[scale], at, row.count);
#pragma unroll
    for (i32 i = 0; i < PACK; i++)
        if (at + i < row.count) advance(w.at[i], g.at[i], mean.at[i], square.at[i], step);
    store_pack(row.parameter, at, row.count, true, w);
    f32 m_absmax, v_absmax;
    store_codes(row.m_codes, at, row.count, encoded(signed_map, mean, 0, m_absmax));
    // A positive second moment stays positive.
    store_codes(row.v_codes, at, row.count, encoded(unsigned_map, square, 1, v_absmax));
    if (lane_index() == 0) row.m_absmax[scale] = m_absmax, row.v_absmax[scale] = v_absmax;
}

// `maps`: the values of the signed and of the unsigned map, then the trees of both.
DEVICE void step_chunk(const Blocks& row, i64 first, const f32* maps, const Step& step) {
    SHARED(f32, map, 4 * CODES);
    for (i32 i = i32(threadIdx.x); i < 4 * CODES; i += THREADS) map[i] = maps[i];
    __syncthreads();
    Map signed_map = {map, map + 2 * CODES}, unsigned_map = {map + CODES, map + 3 * CODES};
    i64 end = chunk_end(first, row.count);
    for (i64 begin = first + warp_index() * SCALED; begin < end; begin += WARPS * SCALED)
        step_scaled(row, begin, signed_map, unsigned_map, step);
}

ENTRY(THREADS, 3)
adamw_8bit_step(f32* __restrict__ parameter, const f32* __restrict__ gradient, u8* __restrict__ m_codes,
                f32* __restrict__ m_absmax, u8* __restrict__ v_codes, f32* __restrict__ v_absmax, const f32* __restrict__ maps,
                i64 count, f32 gradient_scale, f32 keep, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2,
                f32 epsilon) {
    Step step = {gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon};
    step_chunk({parameter, gradient, m_codes, m_absmax, v_codes, v_absmax, count}, i64(blockIdx.x) * CHUNK, maps, step);
}

ENTRY(THREADS, 3)
adamw_8bit_step_many(const Blocks* __restrict__ rows, const i32* __restrict__ chunks, const f32* __restrict__ maps,
                     f32 gradient_scale, f32 keep, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 rate, f32 root2,
                     f32 epsilon) {
    Step step = {gradient_scale, keep, one_minus_beta1, beta2, one_minus_beta2, rate, root2, epsilon};
    Part part = part_of(chunks);
    step_chunk(rows[part.row], part.first, maps, step);
}
