// What all kernels stand on: element types, packs of eight elements, sums over warps and blocks, shared memory, faults.
//
// The only place of intrinsics and PTX. Each wrapper has two bodies: the device's, and the one of the emulation
// (BRIGHTRUN_EMULATED), by which the same kernels run on a CPU. NVRTC compiles this without any header of CUDA's.
//
// Conventions of all kernels:
//   - an entry is `<op>_<types>`, one per combination of element types, made by a macro list at the end of its file;
//   - pointers are `const T* __restrict__` (read) or `T* __restrict__` (written), of element types named as in this file;
//   - counts of elements are i64, extents that the host has checked to fit are i32; offsets are computed in i64;
//   - activations are f32 or bf16, arithmetic is f32; sums have a fixed order, so results have the same bits every time;
//   - tensors begin at 16-byte boundaries (256 on a device).

#pragma once

#ifdef BRIGHTRUN_EMULATED
#include "cuda_emu.h"
#endif

typedef float f32;
typedef double f64;
typedef int i32;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// 16-bit floats as bits; arithmetic is always in f32.
struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

#define DEVICE __device__ __forceinline__
// An entry of at most so many threads a block, and, if given, of which at least so many blocks share a multiprocessor.
#define ENTRY(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr i32 WARP_LANES = 32;
constexpr u32 F32_INFINITY_BITS = 0x7f800000u;
constexpr u32 F32_NAN_BITS = 0x7fffffffu;

// ---- conversions ---------------------------------------------------------------------------------------------------

DEVICE f32 to_f32(f32 value) { return value; }
DEVICE f32 to_f32(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

DEVICE f32 to_f32(f16 value) {
#ifdef BRIGHTRUN_EMULATED
    _Float16 half;
    memcpy(&half, &value.bits, 2);
    return f32(half);
#else
    f32 wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#endif
}

// bf16 bits of two values, the first in the lower half, rounded to nearest even.
DEVICE u32 bf16_pair(f32 low, f32 high) {
#ifdef BRIGHTRUN_EMULATED
    auto round = [](f32 value) {
        u32 bits = __float_as_uint(value);
        if (value != value) return 0x7fffu;
        return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
#else
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

template <class T>
DEVICE T from_f32(f32 value);
template <>
DEVICE f32 from_f32<f32>(f32 value) { return value; }
template <>
DEVICE bf16 from_f32<bf16>(f32 value) {
    bf16 half;
    half.bits = (unsigned short)(bf16_pair(value, 0.0f) & 0xffffu);
    return half;
}

// The value as an activation of type T keeps it.
template <class T>
DEVICE f32 rounded(f32 value) { return to_f32(from_f32<T>(value)); }

// ---- who am I ------------------------------------------------------------------------------------------------------

DEVICE i32 lane_index() { return i32(threadIdx.x) & (WARP_LANES - 1); }
DEVICE i32 warp_index() { return i32(threadIdx.x) / WARP_LANES; }
// Index of this thread in a one-dimensional grid.
DEVICE i64 global_thread() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }

// The value, of which the compiler knows nothing more: what is made of it in a loop is made there, and takes no register beyond.
DEVICE i32 opaque(i32 value) {
#ifndef BRIGHTRUN_EMULATED
    asm volatile("" : "+r"(value));
#endif
    return value;
}
DEVICE i64 opaque(i64 value) {
#ifndef BRIGHTRUN_EMULATED
    asm volatile("" : "+l"(value));
#endif
    return value;
}

// ---- packs: eight elements, moved by 16-byte accesses ---------------------------------------------------------------

constexpr i32 PACK = 8;

struct Pack {
    f32 at[PACK];
};

DEVICE void load_wide(Pack& pack, const f32* from) {
    float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    pack.at[0] = low.x, pack.at[1] = low.y, pack.at[2] = low.z, pack.at[3] = low.w;
    pack.at[4] = high.x, pack.at[5] = high.y, pack.at[6] = high.z, pack.at[7] = high.w;
}
DEVICE void load_wide(Pack& pack, const bf16* from) {
    uint4 bits = *reinterpret_cast<const uint4*>(from);
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        pack.at[2 * i] = __uint_as_float(words[i] << 16);
        pack.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
DEVICE void load_wide(Pack& pack, const f16* from) {
    uint4 bits = *reinterpret_cast<const uint4*>(from);
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        f16 low, high;
        low.bits = (unsigned short)(words[i] & 0xffffu), high.bits = (unsigned short)(words[i] >> 16);
        pack.at[2 * i] = to_f32(low), pack.at[2 * i + 1] = to_f32(high);
    }
}
DEVICE void store_wide(f32* to, const Pack& pack) {
    *reinterpret_cast<float4*>(to) = make_float4(pack.at[0], pack.at[1], pack.at[2], pack.at[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(pack.at[4], pack.at[5], pack.at[6], pack.at[7]);
}
DEVICE void store_wide(bf16* to, const Pack& pack) {
    *reinterpret_cast<uint4*>(to) = make_uint4(bf16_pair(pack.at[0], pack.at[1]), bf16_pair(pack.at[2], pack.at[3]),
                                               bf16_pair(pack.at[4], pack.at[5]), bf16_pair(pack.at[6], pack.at[7]));
}

// Elements `first..first + 8` of a row of `length` elements; zero beyond its end. `aligned`: the row begins at a 16-byte
// boundary and `first` is a multiple of 8.
template <class T>
DEVICE Pack load_pack(const T* row, i64 first, i64 length, bool aligned) {
    Pack pack;
    if (aligned && first + PACK <= length) {
        load_wide(pack, row + first);
        return pack;
    }
#pragma unroll
    for (i32 i = 0; i < PACK; i++) pack.at[i] = first + i < length ? to_f32(row[first + i]) : 0.0f;
    return pack;
}

template <class T>
DEVICE void store_pack(T* row, i64 first, i64 length, bool aligned, const Pack& pack) {
    if (aligned && first + PACK <= length) {
        store_wide(row + first, pack);
        return;
    }
#pragma unroll
    for (i32 i = 0; i < PACK; i++)
        if (first + i < length) row[first + i] = from_f32<T>(pack.at[i]);
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// `SHARED(f32, sums, 32);` declares an array of the block; `DYNAMIC_SHARED(memory);` the u8 array that the launch sized,
// aligned to 1024 bytes.
#ifdef BRIGHTRUN_EMULATED
#define SHARED(type, name, count)     \
    static const char name##_key = 0; \
    type* name = static_cast<type*>(emu::shared_array(&name##_key, sizeof(type) * (count), 128))
#define DYNAMIC_SHARED(name) u8* name = static_cast<u8*>(emu::dynamic_shared())
#else
#define SHARED(type, name, count) __shared__ __align__(128) type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#endif

// ---- sums over lanes, in a fixed order ------------------------------------------------------------------------------

// The value of the lane whose index differs in these bits, or of a lane. All lanes call it.
template <class T>
DEVICE T lane_across(T value, i32 bits) { return __shfl_xor_sync(FULL_WARP, value, bits); }
template <class T>
DEVICE T from_lane(T value, i32 lane) { return __shfl_sync(FULL_WARP, value, lane); }
// Of the lane so far below this one; where there is none, its own.
template <class T>
DEVICE T from_lane_below(T value, i32 by) { return __shfl_up_sync(FULL_WARP, value, by); }

// The sum over LANES neighbouring lanes, a power of two, in each of them.
template <i32 LANES, class T>
DEVICE T lanes_sum(T value) {
#pragma unroll
    for (i32 step = LANES / 2; step > 0; step /= 2) value += lane_across(value, step);
    return value;
}

// The sum over a warp, in every lane.
template <class T>
DEVICE T warp_sum(T value) {
    return lanes_sum<WARP_LANES>(value);
}

// The sum of this lane and those below it.
DEVICE i32 warp_sum_through(i32 value) {
#pragma unroll
    for (i32 step = 1; step < WARP_LANES; step *= 2) {
        i32 below = __shfl_up_sync(FULL_WARP, value, step);
        if (lane_index() >= step) value += below;
    }
    return value;
}

// A bit for every lane of the warp: whether it votes yes.
DEVICE u32 warp_votes(bool yes) { return __ballot_sync(FULL_WARP, yes); }
DEVICE i32 count_bits(u32 bits) { return __popc(bits); }

// Byte `i` of a word, in one instruction.
DEVICE u32 byte_of(u32 word, i32 i) { return __byte_perm(word, 0, 0x4440 + i); }

DEVICE u64 warp_max(u64 value) {
#pragma unroll
    for (i32 step = WARP_LANES / 2; step > 0; step /= 2) {
        u64 other = lane_across(value, step);
        value = other > value ? other : value;
    }
    return value;
}

// The largest over GROUP neighbouring lanes (a power of two of them), in each of them.
template <i32 GROUP>
DEVICE f32 lanes_max(f32 value) {
#pragma unroll
    for (i32 step = GROUP / 2; step > 0; step /= 2) {
        f32 other = lane_across(value, step);
        value = other > value ? other : value;
    }
    return value;
}

// The sum over GROUP neighbouring lanes, in each of them.
template <i32 GROUP>
DEVICE f32 lanes_sum(f32 value) {
#pragma unroll
    for (i32 step = GROUP / 2; step > 0; step /= 2) value += lane_across(value, step);
    return value;
}

DEVICE f32 warp_max(f32 value) { return lanes_max<WARP_LANES>(value); }

// Which lanes of the warp say yes, lane 0 in the lowest bit. All lanes call it.
DEVICE u32 lanes_saying(bool yes) { return __ballot_sync(FULL_WARP, yes); }

// The sum over a block of THREADS threads, in every thread. All threads call it; two calls may follow each other directly.
template <i32 THREADS, class T>
DEVICE T block_sum(T value) {
    constexpr i32 WARPS = THREADS / WARP_LANES;
    SHARED(T, partial, WARPS);
    value = warp_sum(value);
    __syncthreads();  // the last call's readers are done
    if (lane_index() == 0) partial[warp_index()] = value;
    __syncthreads();
    T sum = partial[0];
#pragma unroll
    for (i32 i = 1; i < WARPS; i++) sum += partial[i];
    return sum;
}

// The largest of a block's values, in every thread; NaN is passed over.
template <i32 THREADS>
DEVICE f32 block_max(f32 value) {
    constexpr i32 WARPS = THREADS / WARP_LANES;
    SHARED(f32, partial, WARPS);
    value = warp_max(value);
    __syncthreads();  // the last call's readers are done
    if (lane_index() == 0) partial[warp_index()] = value;
    __syncthreads();
    f32 largest = partial[0];
#pragma unroll
    for (i32 i = 1; i < WARPS; i++) largest = partial[i] > largest ? partial[i] : largest;
    return largest;
}

// The sum over the GROUP threads (a warp, or a whole block) that share a row.
template <i32 GROUP, class T>
DEVICE T group_sum(T value) {
    if constexpr (GROUP == WARP_LANES) {
        return warp_sum(value);
    } else {
        return block_sum<GROUP>(value);
    }
}

// ---- tensor cores: bf16 factors, f32 sums ----------------------------------------------------------------------------
//
// A warp multiplies A 16×16 by B 16×8. Lane l holds, with g = l / 4 and t = l % 4 (PTX ISA, mma.m16n8k16):
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)    and the element to the right, in the upper half
//   b[0] (2t, g)  b[1] (2t + 8, g)                                            and the element below, in the upper half
//   sum[0], sum[1] (g, 2t), (g, 2t + 1)    sum[2], sum[3] (g + 8, 2t), (g + 8, 2t + 1)

// sum += A B.
DEVICE void multiply_add(f32 (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef BRIGHTRUN_EMULATED
    struct Operands {
        u32 a[4], b[2];
        f32 sum[4];
    } operands = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {sum[0], sum[1], sum[2], sum[3]}};
    struct Sums {
        f32 sum[4];
    } sums = emu::together<Sums>(operands, emu::mma_m16n8k16_bf16, 40, EMU_SITE);
    for (i32 i = 0; i < 4; i++) sum[i] = sums.sum[i];
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A place in shared memory, counted in bytes: 32 bits on a device, so that the next place is one addition away and constants cost
// nothing. `^` flips bits of a place within a block that begins at a multiple of 128 bytes.
struct SharedAddress {
#ifdef BRIGHTRUN_EMULATED
    u8* memory;
    i32 offset;

    DEVICE SharedAddress operator+(i32 bytes) const { return {memory, offset + bytes}; }
    DEVICE SharedAddress operator^(i32 bits) const { return {memory, offset ^ bits}; }
    DEVICE u8* pointer() const { return memory + offset; }
#else
    u32 at;

    DEVICE SharedAddress operator+(i32 bytes) const { return {at + u32(bytes)}; }
    DEVICE SharedAddress operator^(i32 bits) const { return {at ^ u32(bits)}; }
#endif
};

#ifdef BRIGHTRUN_EMULATED
DEVICE SharedAddress shared_place(void* memory) { return {static_cast<u8*>(memory), 0}; }
DEVICE void store_shared(SharedAddress to, uint4 value) { *reinterpret_cast<uint4*>(to.pointer()) = value; }
#else
DEVICE u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }
DEVICE SharedAddress shared_place(void* memory) { return {shared_address(memory)}; }
DEVICE void store_shared(SharedAddress to, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to.at), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}
#endif

// Four 8×8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes at a
// 16-byte boundary, and gets of matrix i the elements (l / 4, 2 (l % 4)) and its right neighbour in out[i].
// Matrices (rows 0–7, columns 0–7), (rows 8–15, 0–7), (0–7, 8–15), (8–15, 8–15) of a row-major A make its fragment.
DEVICE void load_matrices(u32 (&out)[4], const void* row) {
#ifdef BRIGHTRUN_EMULATED
    struct Registers {
        u32 at[4];
    } registers = emu::together<Registers>(row, emu::ldmatrix_x4, 16, EMU_SITE);
    for (i32 i = 0; i < 4; i++) out[i] = registers.at[i];
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same of the transposed matrices: out[i] has elements (2 (l % 4), l / 4) and the one below.
DEVICE void load_matrices_transposed(u32 (&out)[4], const void* row) {
#ifdef BRIGHTRUN_EMULATED
    struct Registers {
        u32 at[4];
    } registers = emu::together<Registers>(row, emu::ldmatrix_x4_transposed, 16, EMU_SITE);
    for (i32 i = 0; i < 4; i++) out[i] = registers.at[i];
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

#ifdef BRIGHTRUN_EMULATED
DEVICE void load_matrices(u32 (&out)[4], SharedAddress row) { load_matrices(out, row.pointer()); }
DEVICE void load_matrices_transposed(u32 (&out)[4], SharedAddress row) { load_matrices_transposed(out, row.pointer()); }
#else
DEVICE void load_matrices(u32 (&out)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row.at)
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&out)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row.at)
                 : "memory");
}
#endif

// ---- asynchronous copies to shared memory ----------------------------------------------------------------------------

// Begins to copy 16 bytes, both sides at 16-byte boundaries; the bytes from `valid` on become zero and are not read. The bytes
// are there for this thread after `copies_wait`, and for the block after a barrier behind it.
DEVICE void copy_async(void* shared, const void* global, i32 valid) {
#ifdef BRIGHTRUN_EMULATED
    emu::copy_async(shared, global, 16, u32(valid));
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
#endif
}

// The same of all sixteen bytes, or of none.
DEVICE void copy_async(SharedAddress shared, const void* global, bool exists) {
#ifdef BRIGHTRUN_EMULATED
    emu::copy_async(shared.pointer(), global, 16, exists ? 16 : 0);
#else
    asm volatile(
        "{\n"
        ".reg .pred absent;\n"
        "setp.eq.s32 absent, %2, 0;\n"
        "cp.async.cg.shared.global [%0], [%1], 16, absent;\n"
        "}" ::"r"(shared.at),
        "l"(global), "r"(i32(exists))
        : "memory");
#endif
}

// Ends a group of copies.
DEVICE void copies_commit() {
#ifdef BRIGHTRUN_EMULATED
    emu::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most LEFT of this thread's groups are under way.
template <i32 LEFT>
DEVICE void copies_wait() {
#ifdef BRIGHTRUN_EMULATED
    emu::copy_async_wait(LEFT);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile whose rows are CHUNKS (4, 8 or a multiple of 8) chunks long, in
// chunks. The order of a row's chunks changes from row to row, so that eight rows of one column of chunks, which is what
// `load_matrices` reads at once, lie in eight different groups of banks.
template <i32 CHUNKS>
DEVICE i32 swizzled(i32 row, i32 chunk) {
    if constexpr (CHUNKS == 4) {
        return row * 4 + (chunk ^ (row >> 1 & 3));
    } else {
        return row * CHUNKS + (chunk ^ (row & 7));
    }
}

// ---- functions -----------------------------------------------------------------------------------------------------

// 1 / (1 + e^−x). expf is good to 2 units in the last place on a device; it overflows to ∞ for x < −88, which gives 0.
DEVICE f32 logistic(f32 x) { return 1.0f / (1.0f + expf(-x)); }

DEVICE f32 infinity() { return __uint_as_float(F32_INFINITY_BITS); }

// 2^x, good to 2 units in the last place of f32; results below 2⁻¹²⁶ are zero on a device.
DEVICE f32 power_of_two(f32 x) {
#ifdef BRIGHTRUN_EMULATED
    return exp2f(x);
#else
    f32 power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}

// ---- faults --------------------------------------------------------------------------------------------------------

// Notes that data on the device broke an op's contract: `code` says which (gpu/faults.rs), `value` is the culprit. The host
// looks when it next reads, so no op waits for the device. The first fault wins.
DEVICE void report_fault(i32* faults, i32 code, i32 value) {
    if (atomicCAS(&faults[0], 0, code) == 0) faults[1] = value;
}
