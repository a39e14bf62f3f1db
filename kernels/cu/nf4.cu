// Decoding NF4 to bf16 or f32; see nf4.cuh for the format.
//
//   dequantize   out[e] = bf16(CODE[code[e]] · absmax[e / 64])
//
// Tensors: codes u8 [ceil(n / 2)], scales flat f32 or nested (resolved in the same launch), out bf16 or f32 [n], n = O · I.
//
// Bytes for n elements: 0.5 n codes, n / 16 of flat scales or n / 64 of nested ones, and the result, 2 n or 4 n. Limited by
// memory: at 4.3 TB/s a layer of Qwen3-Next's experts (1.6 G elements, 0.83 GB in, 3.22 GB out) takes 0.94 ms.
//
// Decomposition: a block decodes 8192 elements in four rounds. In a round a thread decodes eight: 4 bytes of codes, and one 16-byte
// store of bf16 or two of f32, so that a warp reads 128 bytes and writes 512 or 1024 without a gap; the four rounds' reads are all
// under way before the first is used. Eight lanes share a scale. The table of sixteen values lies in shared memory.
//
// Numerics: the product in f32, rounded to bf16 (nearest even), whichever type `out` has: the bits of bitsandbytes.

#include "nf4.cuh"

constexpr i32 THREADS = 256;
constexpr i32 ROUNDS = 4;

// Four bytes of codes from element `first` on, a multiple of 8; zeros beyond the end.
DEVICE u32 load_codes(const u8* codes, i64 first, i64 count) {
    if (first + PACK <= count) return *reinterpret_cast<const u32*>(codes + first / 2);
    u32 word = 0;
    for (i32 i = 0; first + 2 * i < count; i++) word |= u32(codes[first / 2 + i]) << 8 * i;
    return word;
}

template <class T>
DEVICE void dequantize(const u8* codes, Nf4Scales scales, T* out, i64 count) {
    SHARED(f32, table, 16);
    nf4_table(table);
    __syncthreads();
    i64 begin = i64(blockIdx.x) * (THREADS * PACK * ROUNDS) + i32(threadIdx.x) * PACK;
    u32 words[ROUNDS];
    f32 scale[ROUNDS];
#pragma unroll
    for (i32 round = 0; round < ROUNDS; round++) {
        i64 first = begin + round * (THREADS * PACK);
        words[round] = load_codes(codes, first, count);
        scale[round] = first < count ? scales.of(first / NF4_BLOCK) : 0.0f;
    }
#pragma unroll
    for (i32 round = 0; round < ROUNDS; round++) {
        Pack pack;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            u32 code = words[round] >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15;
            pack.at[i] = rounded<bf16>(table[code] * scale[round]);
        }
        store_pack(out, begin + round * (THREADS * PACK), count, true, pack);
    }
}

#define DEQUANTIZE(T)                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    dequantize_flat_##T(const u8* __restrict__ codes, const f32* __restrict__ absmax, T* __restrict__ out, i64 count) {     \
        dequantize<T>(codes, Nf4Scales{absmax, nullptr, nullptr, 0.0f}, out, count);                                        \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    dequantize_nested_##T(const u8* __restrict__ codes, const u8* __restrict__ nested_codes,                                \
                          const f32* __restrict__ nested_absmax, const f32* __restrict__ nested_map, f32 offset,            \
                          T* __restrict__ out, i64 count) {                                                                 \
        dequantize<T>(codes, Nf4Scales{nested_absmax, nested_codes, nested_map, offset}, out, count);                       \
    }
DEQUANTIZE(f32)
DEQUANTIZE(bf16)
