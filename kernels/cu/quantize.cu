// Quantising to NF4 with bitsandbytes' bits; see nf4.cuh for the format.
//
//   quantize_nf4      absmax[b] = max |x| of block b;  code[e] = how many boundaries lie below x[e] / absmax[b]
//   quantize_nf4_fp8  the same of x = E4M3 code · scale of its block of a matrix, decoded on the way
//   nested_mean       offset = mean of the scales, added in the order of torch's f32 mean
//   nested_scales     the scales themselves, less the offset, in 8 bits: groups of 256 with a scale each
//
// Tensors: source f32, bf16 or f16 [n]; of the FP8 form E4M3 [O, I] with scales f32 or bf16, one a block of any extents (128 ×
// 128 in releases); codes u8 [ceil(n / 2)]; absmax f32 [blocks], blocks = ceil(n / 64); nested codes u8
// [blocks], nested_absmax f32 [ceil(blocks / 256)], map f32 [256] ascending.
//
// Bytes: the source once, half a byte an element and 4 a block written; nesting reads the scales twice. Limited by memory.
//
// Decomposition: a thread quantises eight elements, so eight lanes share a block of 64 and find its largest by three shuffles. The
// mean is one warp: the order of its sum is that of 32 chains, one a lane, and a matrix of 2 M elements has 1024 steps. Nesting:
// a block of threads a group.
//
// Numerics: every operation rounds once, as the peer's does, so none is fused. A full block is multiplied by the reciprocal of its
// scale; a shorter last one is divided, and its stored scale has a lower bound: so the peer does it. A block with an element
// that is not finite is reported, and its scale is NaN.

#include "nf4.cuh"

constexpr i32 THREADS = 256;
constexpr i32 LANES_OF_BLOCK = NF4_BLOCK / PACK;
// Scales below this are taken as this, so that a block of zeros is not divided by zero. It is a subnormal number.
constexpr f32 SMALLEST_SCALE = 1e-38f;

DEVICE bool is_finite(f32 value) { return (__float_as_uint(value) & F32_INFINITY_BITS) != F32_INFINITY_BITS; }

// Keeps NaN.
DEVICE f32 within_one(f32 value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }

// The code of a value in −1..=1: how many midpoints between neighbouring codes lie below it.
DEVICE u32 nearest_code(f32 value) {
    u32 code = 0;
#pragma unroll
    for (i32 i = 0; i < 15; i++) code += __fmul_rn(__fadd_rn(NF4_VALUES[i], NF4_VALUES[i + 1]), 0.5f) < value;
    return code;
}

// Quantises the elements of this thread, those from `first` on; zeros beyond the end.
DEVICE void quantize_pack(const Pack& pack, i64 first, u8* codes, f32* absmax, i64 count, i32* faults, i32 fault) {
    f32 largest = 0.0f;
    i32 broken = 0;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        f32 size = fabsf(pack.at[i]);
        largest = size > largest ? size : largest;
        broken |= !is_finite(size);
    }
    // All lanes take part, those beyond the end too.
#pragma unroll
    for (i32 step = LANES_OF_BLOCK / 2; step > 0; step /= 2) {
        f32 other = lane_across(largest, step);
        largest = other > largest ? other : largest;
        broken |= lane_across(broken, step);
    }
    if (first >= count) return;
    i64 block = first / NF4_BLOCK;
    bool full = block * NF4_BLOCK + NF4_BLOCK <= count;
    f32 bounded = largest > SMALLEST_SCALE ? largest : SMALLEST_SCALE;
    if (first % NF4_BLOCK == 0) {
        absmax[block] = broken ? __uint_as_float(F32_NAN_BITS) : full ? largest : bounded;
        if (broken) report_fault(faults, fault, block < 0x7fffffff ? i32(block) : 0x7fffffff);
    }
    f32 reciprocal = __frcp_rn(bounded);
    u32 word = 0;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        f32 scaled = full ? __fmul_rn(pack.at[i], reciprocal) : __fdiv_rn(pack.at[i], bounded);
        word |= nearest_code(within_one(scaled)) << (8 * (i / 2) + (i % 2 ? 0 : 4));
    }
    u8* to = codes + first / 2;
    if (first + PACK <= count) {
        *reinterpret_cast<u32*>(to) = word;
    } else {
        for (i32 i = 0; first + 2 * i < count; i++) to[i] = u8(word >> 8 * i);
    }
}

template <class S>
DEVICE void quantize_nf4(const S* source, u8* codes, f32* absmax, i64 count, i32* faults, i32 fault) {
    i64 first = global_thread() * PACK;
    quantize_pack(load_pack(source, first, count, true), first, codes, absmax, count, faults, fault);
}

// An 8-bit float as bits: a sign, four bits of exponent with bias 7, three of mantissa, no infinities (OCP E4M3).
struct f8e4m3 {
    u8 bits;
};

// As `fp8::value` has it: a normal code has the fields of an f32, narrower and with another bias; a subnormal one is a multiple
// of 2⁻⁹; all ones is not a number.
DEVICE f32 value_of_fp8(u32 code) {
    u32 magnitude = code & 0x7fu;
    u32 bits = magnitude < 8 ? __float_as_uint(f32(magnitude) * (1.0f / 512.0f)) : (magnitude << 20) + ((127 - 7) << 23);
    if (magnitude == 0x7fu) bits = 0x7fc00000u;
    return __uint_as_float(bits | (code & 0x80u) << 24);
}

// Scales of blocks of `high` rows and `wide` columns of a matrix of `columns` columns; the last of a row or column of blocks may
// be cut short. A thread's eight elements begin anywhere in a row and may go on in the next.
template <class S>
DEVICE void quantize_nf4_fp8(const f8e4m3* source, const S* scales, u8* codes, f32* absmax, i64 count, i32 columns, i32 high,
                             i32 wide, i32* faults, i32 fault) {
    i64 first = global_thread() * PACK, row = first / columns;
    i32 column = i32(first - row * columns), across = (columns + wide - 1) / wide;
    u32 words[2] = {};
    if (first + PACK <= count) {
        uint2 both = *reinterpret_cast<const uint2*>(source + first);
        words[0] = both.x, words[1] = both.y;
    } else {
#pragma unroll
        for (i32 i = 0; i < PACK; i++)
            if (first + i < count) words[i / 4] |= u32(source[first + i].bits) << 8 * (i % 4);
    }
    Pack pack;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        pack.at[i] = 0.0f;
        if (first + i < count) {
            f32 scale = to_f32(scales[row / high * across + column / wide]);
            pack.at[i] = __fmul_rn(value_of_fp8(byte_of(words[i / 4], i % 4)), scale);
        }
        if (++column == columns) row++, column = 0;
    }
    quantize_pack(pack, first, codes, absmax, count, faults, fault);
}

#define QUANTIZE_FP8(S)                                                                                                  \
    ENTRY(THREADS)                                                                                                       \
    quantize_nf4_fp8_##S(const f8e4m3* __restrict__ source, const S* __restrict__ scales, u8* __restrict__ codes,        \
                         f32* __restrict__ absmax, i64 count, i32 columns, i32 high, i32 wide, i32* __restrict__ faults, \
                         i32 fault) {                                                                                    \
        quantize_nf4_fp8<S>(source, scales, codes, absmax, count, columns, high, wide, faults, fault);                   \
    }
QUANTIZE_FP8(f32)
QUANTIZE_FP8(bf16)

#define QUANTIZE(S)                                                                                                      \
    ENTRY(THREADS)                                                                                                       \
    quantize_nf4_##S(const S* __restrict__ source, u8* __restrict__ codes, f32* __restrict__ absmax, i64 count,          \
                     i32* __restrict__ faults, i32 fault) {                                                              \
        quantize_nf4<S>(source, codes, absmax, count, faults, fault);                                                    \
    }
QUANTIZE(f32)
QUANTIZE(bf16)
QUANTIZE(f16)

constexpr i32 CHAINS = 8;  // torch adds vectors of eight f32
constexpr i32 CHAIN_ROWS = 4;
constexpr i32 LEVELS = 4;

// The mean of fewer than eight values: as below, with vectors of one.
DEVICE f32 mean_of_few(const f32* values, i32 count) {
    i32 whole = count / CHAIN_ROWS * CHAIN_ROWS;
    f32 sum = whole > 0 ? values[0] : 0.0f;
    for (i32 i = whole; i < count; i++) sum += values[i];
    for (i32 i = 1; i < whole; i++) sum += values[i];
    return __fdiv_rn(sum, f32(count));
}

// Four interleaved rows of vectors of eight, each a cascade of four levels where a level is added to the next after 2^power
// additions; then what is left over, the rows and the eight lanes in order. `count` is not 0.
ENTRY(32) nested_mean(const f32* __restrict__ absmax, f32* __restrict__ mean, i64 count, i32 power) {
    i32 lane = lane_index();
    if (count < CHAINS) {
        if (lane == 0) mean[0] = mean_of_few(absmax, i32(count));
        return;
    }
    i64 vectors = count / CHAINS, steps = vectors / CHAIN_ROWS;
    f32 level[LEVELS] = {};
    for (i64 step = 0; step < steps; step++) {
        level[0] += absmax[step * WARP_LANES + lane];
        i64 done = step + 1;
#pragma unroll
        for (i32 i = 0; i + 1 < LEVELS; i++) {
            if (done % (i64(1) << power * (i + 1)) != 0) break;
            level[i + 1] += level[i];
            level[i] = 0.0f;
        }
    }
    f32 sum = level[0];
#pragma unroll
    for (i32 i = 1; i < LEVELS; i++) sum += level[i];
    if (lane < CHAINS)
        for (i64 vector = steps * CHAIN_ROWS; vector < vectors; vector++) sum += absmax[vector * CHAINS + lane];
#pragma unroll
    for (i32 row = 1; row < CHAIN_ROWS; row++) {
        f32 other = from_lane(sum, lane % CHAINS + row * CHAINS);
        if (lane < CHAINS) sum += other;
    }
    f32 total = 0.0f;
    for (i64 i = vectors * CHAINS; i < count; i++) total += absmax[i];
#pragma unroll
    for (i32 i = 0; i < CHAINS; i++) total += from_lane(sum, i);
    if (lane == 0) mean[0] = __fdiv_rn(total, f32(count));
}

// Of the 65536 bins that −1..=1 is cut into, the one of a value; NaN is in the first.
DEVICE i32 bin_of(f32 value) {
    f32 bin = __fadd_rn(__fmul_rn(__fmul_rn(__fadd_rn(value, 1.0f), 0.5f), 65535.0f), 0.5f);
    return bin >= 0.0f ? bin < 65535.0f ? i32(bin) : 65535 : 0;
}

ENTRY(THREADS)
nested_scales(const f32* __restrict__ absmax, const f32* __restrict__ mean, const f32* __restrict__ map, u8* __restrict__ codes,
              f32* __restrict__ nested_absmax, i64 count) {
    SHARED(f32, middles, NF4_NESTED_BLOCK);
    i32 thread = i32(threadIdx.x);
    if (thread + 1 < NF4_NESTED_BLOCK) middles[thread] = __fmul_rn(0.5f, __fadd_rn(map[thread], map[thread + 1]));
    i64 at = i64(blockIdx.x) * NF4_NESTED_BLOCK + thread;
    f32 shifted = at < count ? __fsub_rn(absmax[at], mean[0]) : 0.0f;
    f32 largest = block_max<THREADS>(fabsf(shifted));
    if (thread == 0) nested_absmax[blockIdx.x] = largest;
    if (at >= count) return;
    // A code is that of the map entry nearest to the value's bin: near zero, where the map is finer than a bin, it is not the
    // nearest to the value. So the peer does it.
    i32 bin = bin_of(within_one(__fmul_rn(shifted, __frcp_rn(largest))));
    f32 value = __fadd_rn(-1.0f, __fdiv_rn(__fmul_rn(2.0f, f32(bin)), 65535.0f));
    i32 low = 0, high = NF4_NESTED_BLOCK - 1;  // the number of middles below the value lies in low..=high
    while (low < high) {
        i32 middle = (low + high) / 2;
        if (middles[middle] < value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    codes[at] = largest == 0.0f ? 0 : u8(low);
}
