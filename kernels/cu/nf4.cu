// Decoding NF4 to bf16 or f32; see nf4.cuh for the format.
//
//   dequantize   out[e] = bf16(CODE[code[e]] · absmax[e / 64])
//
// Tensors: codes u8 [ceil(n / 2)], scales flat f32 or nested (resolved in the same launch), out bf16 or f32 [n], n = O · I.
//
// Bytes for n elements: 0.5 n codes, n / 16 of flat scales or n / 64 of nested ones, and the result, 2 n or 4 n. Limited by
// memory: at 4.3 TB/s a layer of Qwen3-Next's experts (1.6 G elements, 0.83 GB in, 3.22 GB out) takes 0.94 ms.
//
// Decomposition: a thread decodes 32 elements: 16 bytes of codes in one access, half a block, so one scale; four 16-byte stores
// of bf16, or eight of f32. The table of sixteen values lies in shared memory. The last thread may have fewer elements.
//
// Numerics: the product in f32, rounded to bf16 (nearest even), whichever type `out` has: the bits of bitsandbytes.

#include "nf4.cuh"

constexpr i32 THREADS = 256;
constexpr i32 ELEMENTS = 32;  // of a thread

template <class T>
DEVICE void dequantize(const u8* codes, Nf4Scales scales, T* out, i64 count) {
    SHARED(f32, table, 16);
    nf4_table(table);
    __syncthreads();
    i64 first = global_thread() * ELEMENTS;
    if (first >= count) return;
    f32 scale = scales.of(first / NF4_BLOCK);
    i64 bytes = (count + 1) / 2;
    u32 words[4] = {0, 0, 0, 0};
    if (first / 2 + 16 <= bytes) {
        uint4 loaded = *reinterpret_cast<const uint4*>(codes + first / 2);
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else {
        for (i32 i = 0; first / 2 + i < bytes; i++) words[i / 4] |= u32(codes[first / 2 + i]) << 8 * (i % 4);
    }
#pragma unroll
    for (i32 word = 0; word < 4; word++) {
        Pack pack;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            u32 code = words[word] >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15;
            pack.at[i] = rounded<bf16>(table[code] * scale);
        }
        store_pack(out, first + word * PACK, count, true, pack);
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
