// 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314), as bitsandbytes 0.50 stores it.
//
// A matrix [O, I] is flattened row-major; two codes a byte, the first in the high nibble; 64 elements share a scale. Element e
// of block b is bf16(CODE[code] · absmax[b]), the product in f32. Nested scales are 8-bit codes themselves:
// absmax[b] = map[codes[b]] · nested_absmax[b / 256] + offset, multiplied and added with a rounding each.

#pragma once
#include "common.cuh"

constexpr i32 NF4_BLOCK = 64;
constexpr i32 NF4_NESTED_BLOCK = 256;

// The sixteen values, ascending (appendix E of the paper).
__constant__ f32 NF4_VALUES[16] = {-1.0f,        -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                                   -0.091050036f, 0.0f,        0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                                   0.44070983f,  0.562617f,   0.72295684f,  1.0f};

// Where the scales of a matrix come from. `nested_codes` is null where they are flat.
struct Nf4Scales {
    const f32* absmax;  // flat: one a block; nested: one for 256 blocks
    const u8* nested_codes;
    const f32* nested_map;
    f32 offset;

    DEVICE f32 of(i64 block) const {
        if (nested_codes == nullptr) return absmax[block];
        return __fadd_rn(__fmul_rn(nested_map[nested_codes[block]], absmax[block / NF4_NESTED_BLOCK]), offset);
    }
};

// Fills a table of the sixteen values in shared memory, which every thread then indexes by codes of its own: constant memory
// would serve different addresses of a warp one after another, here they are sixteen banks, and equal codes a broadcast. A
// barrier must follow.
DEVICE void nf4_table(f32* table) {
    if (threadIdx.x < 16) table[threadIdx.x] = NF4_VALUES[threadIdx.x];
}
