// Random contents: an element is a function of a key and its index, so they are made where they lie, in any order.
//
//   bits(c)   SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2660193.2660195) of the key at counter c: 64 bits
//   bytes     element i = byte i mod 8 of bits(i / 8), the lowest first: each of 256 values equally likely
//   normal    element i = mean + step · (q0 + q1 + q2 + q3 − 131 070), the q being the four 16-bit quarters of bits(i)
//
// Tensors: out [count] of u8, f32 or bf16. The sum of four uniform numbers (Irwin–Hall) has deviation √((2³² − 1) / 3) and is never
// further from its mean than 3.46 deviations; the host divides by the deviation, so that `step` is for one unit of the sum.
//
// Bytes: out once. Limited by memory: a hash is some 30 instructions, for 8 bytes of codes or for one element of 2 or 4 bytes.
//
// Decomposition: a thread does a pack of eight elements, one 8- or 16-byte store or two of them; the last pack may be short.
//
// Numerics: the sum is an integer below 2¹⁸, exact in f32; one product, one sum, one rounding to bf16, none of them fused. The CPU
// backend has the same bits.

#include "common.cuh"

constexpr i32 THREADS = 256;
constexpr u64 GAMMA = 0x9e3779b97f4a7c15ull;  // 2⁶⁴ / φ
constexpr i32 CENTRE = 131070;                // the mean of a sum of four quarters

DEVICE u64 random_bits(u64 key, u64 counter) {
    u64 bits = key + (counter + 1) * GAMMA;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebull;
    return bits ^ bits >> 31;
}

ENTRY(THREADS) fill_random_bytes(u8* __restrict__ out, i64 count, i64 key) {
    i64 pack = global_thread(), first = pack * PACK;
    if (first >= count) return;
    u64 bits = random_bits(u64(key), u64(pack));
    if (first + PACK <= count) {
        *reinterpret_cast<u64*>(out + first) = bits;
        return;
    }
    for (i64 i = first; i < count; i++, bits >>= 8) out[i] = u8(bits & 0xff);
}

template <class T>
DEVICE void normal(T* out, i64 count, u64 key, f32 mean, f32 step) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack pack;
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        u64 bits = random_bits(key, u64(first + i));
        u32 low = u32(bits), high = u32(bits >> 32);
        i32 sum = i32((low & 0xffff) + (low >> 16) + (high & 0xffff) + (high >> 16)) - CENTRE;
        pack.at[i] = __fadd_rn(mean, __fmul_rn(step, f32(sum)));
    }
    store_pack(out, first, count, true, pack);
}

#define NORMAL(T)                                                                                              \
    ENTRY(THREADS) fill_random_normal_##T(T* __restrict__ out, i64 count, i64 key, f32 mean, f32 step) {       \
        normal<T>(out, count, u64(key), mean, step);                                                           \
    }
NORMAL(f32)
NORMAL(bf16)
