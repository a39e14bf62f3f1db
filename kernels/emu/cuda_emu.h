// CUDA C++ on a CPU: what a kernel's source needs so that g++ compiles it.
//
// A block's threads are fibers: stacks of their own on one operating-system thread, switched where CUDA threads wait for each
// other (barriers, shuffles, votes, tensor-core instructions) and nowhere else. A kernel is therefore ordinary code at full
// speed between two such points. Blocks of a grid are spread over operating-system threads.
//
// What the emulation finds, beyond wrong results:
//   - an access outside any allocation: allocations end at a protected page, and the message names argument and distance;
//   - a barrier or warp operation that not all its threads reach, or that they reach at different places of the source;
//   - reading shared memory that nothing wrote: it is NaN in every float type when a block begins;
//   - writing past a shared array: each has a checked margin;
//   - a missing barrier: threads run in rising and in falling order by turns, so a value that a neighbour has "already" written
//     in one order is missing in the other;
//   - an access that is not aligned to its width, an index outside an array, an overflow of a signed integer: the compiler's own
//     checks;
//   - a copy that was not waited for: `cp.async` puts NaN in its place until the wait;
//   - the same of the copy engine and of wgmma, and how barriers count bytes: see `hopper_emu.h`.
//
// The scheduler, memory and warp operations live in `cuda_emu.cpp`; this header is what is inlined into kernels.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emu {

constexpr int WARP = 32;
constexpr int SLOT_BYTES = 64;

// What the lanes of a warp give each other. Two sets of slots by turns: a lane that has read set 0 may write set 1 while
// others still read set 0.
struct Warp {
    alignas(64) unsigned char slots[2][WARP][SLOT_BYTES];
    unsigned unread[2];  // lanes that have yet to read a finished set
    unsigned expected, arrived;
    int parity;
    const char* site;
};

struct Block;

struct Fiber {
    uint3 thread;
    unsigned lane;
    Warp* warp;
    Block* block;
    void* stack_pointer;
    int state;
    const char* site;  // where it waits
    void* copies;      // its cp.async groups, made when first used
    void* fake_stack;  // the address sanitizer's, while it waits
};

// What every thread of a block sees alike; first in `Block`.
struct Frame {
    uint3 block;
    dim3 grid, block_size;
};

extern __thread Fiber* self __attribute__((tls_model("initial-exec")));

static inline Frame* frame() { return reinterpret_cast<Frame*>(self->block); }

// Waits until every thread of the block is here.
void block_barrier(const char* site);
// Waits until `count` threads are at barrier `id`; `arrive` does not wait.
void named_barrier(unsigned id, unsigned count, bool waits, const char* site);
// Puts `bytes` of `value` into this lane's slot and waits for all lanes of `mask`; `finish`, if given, runs once, on the last
// lane, before the others go on. Returns the set of slots; `warp_done` says that this lane has read it.
unsigned char (*warp_exchange(unsigned mask, const void* value, unsigned bytes, void (*finish)(unsigned char (*)[SLOT_BYTES]),
                              const char* site, int* parity))[SLOT_BYTES];
static inline void warp_done(int parity) { self->warp->unread[parity] &= ~(1u << self->lane); }
// The block's array that `key` stands for, made on first use.
void* shared_array(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
size_t dynamic_shared_bytes();
// Stops the launch with a message.
[[noreturn]] void fail(const char* format, ...);

// cp.async: `bytes` of 4, 8 or 16, of which `valid` come from `source` and the rest are zero.
void copy_async(void* target, const void* source, unsigned bytes, unsigned valid);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

// What tensor-core instructions do once all lanes are there; see cuda_emu.cpp for what their slots hold.
void mma_m16n8k16_bf16(unsigned char (*slots)[SLOT_BYTES]);
void ldmatrix_x4(unsigned char (*slots)[SLOT_BYTES]);
void ldmatrix_x4_transposed(unsigned char (*slots)[SLOT_BYTES]);

// What Hopper adds; see hopper_emu.h.
unsigned shared_offset(const void* pointer);
void mbarrier_init(void* barrier, unsigned count);
void mbarriers_publish();
void mbarrier_arrive(void* barrier, const char* site);
void mbarrier_expect(void* barrier, unsigned bytes, const char* site);
void mbarrier_wait(void* barrier, unsigned parity, const char* site);
void copy_box(void* target, const void* map, int x, int y, int z, void* barrier, const char* site);
void proxy_fence();
// sum += A B, or sum = A B without `adds`: A in registers, or described by `a_shared`, B by `b_shared`; `count` sums a thread, for
// 2 · count columns.
struct Wgmma {
    float* sum;
    unsigned count;
    const unsigned* a;
    uint64_t a_shared, b_shared;
    bool a_transposed, b_transposed, adds;
};
// The fence, and registers of left factors, so many of them, that it is for: they may be used without another one as they are now.
void wgmma_fence(const unsigned* registers = nullptr, unsigned count = 0);
void wgmma(const Wgmma& what, const char* site);
void wgmma_commit(const char* site);
void wgmma_wait(unsigned groups_left, const char* site);

template <class Value, class Read>
static inline auto exchange(unsigned mask, const Value& value, const char* site, Read read) {
    static_assert(sizeof(Value) <= SLOT_BYTES, "larger than a slot");
    int parity;
    auto slots = warp_exchange(mask, &value, sizeof(Value), nullptr, site, &parity);
    auto result = read(slots);
    warp_done(parity);
    return result;
}

template <class Value>
static inline Value slot(unsigned char (*slots)[SLOT_BYTES], unsigned lane) {
    Value value;
    memcpy(&value, slots[lane], sizeof(Value));
    return value;
}

// Puts `value` into this lane's slot, lets `finish` work on all slots, and takes `Result` from this lane's at `offset`.
template <class Result, class Value>
static inline Result together(const Value& value, void (*finish)(unsigned char (*)[SLOT_BYTES]), unsigned offset,
                              const char* site) {
    int parity;
    auto slots = warp_exchange(0xffffffffu, &value, sizeof(Value), finish, site, &parity);
    Result result;
    memcpy(&result, slots[self->lane] + offset, sizeof(Result));
    warp_done(parity);
    return result;
}

template <class Value>
static inline Value shuffle(unsigned mask, const Value& value, unsigned source, const char* site) {
    return exchange(mask, value, site, [&](unsigned char (*slots)[SLOT_BYTES]) {
        if (!(mask >> source & 1)) fail("%s: a shuffle reads lane %u, which is not in its mask %08x", site, source, mask);
        return slot<Value>(slots, source);
    });
}

// Lane within a segment of `width` lanes, as the shuffles count.
static inline unsigned within(unsigned width) { return self->lane & (width - 1); }
static inline unsigned segment(unsigned width) { return self->lane & ~(width - 1); }

static inline unsigned ballot(unsigned mask, bool vote, const char* site) {
    return exchange(mask, vote, site, [&](unsigned char (*slots)[SLOT_BYTES]) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < WARP; lane++)
            if (mask >> lane & 1) votes |= unsigned(slot<bool>(slots, lane)) << lane;
        return votes;
    });
}

// An f32 operation whose result is not fused with the next one.
static inline float unfused(float value) {
#if defined(__x86_64__)
    asm("" : "+x"(value));
#else
    asm("" : "+w"(value));
#endif
    return value;
}

template <class... A, size_t... I>
static inline void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A>
static inline void call(void (*kernel)(A...), void** arguments) {
    apply(kernel, arguments, std::make_index_sequence<sizeof...(A)>());
}

}  // namespace emu

// The door by which a kernel is launched; one line for each entry is added to its source.
#define EMU_ENTRY(name) \
    extern "C" void emu_entry_##name(void** arguments) { emu::call(&name, arguments); }

#define EMU_TEXT_(line) #line
#define EMU_TEXT(line) EMU_TEXT_(line)
#define EMU_SITE __FILE__ ":" EMU_TEXT(__LINE__)

#define threadIdx (emu::self->thread)
#define blockIdx (emu::frame()->block)
#define gridDim (emu::frame()->grid)
#define blockDim (emu::frame()->block_size)

#define __syncthreads() emu::block_barrier(EMU_SITE)
#define __syncwarp(...) ((void)emu::ballot(0xffffffffu, true, EMU_SITE))
#define __shfl_sync(mask, value, lane) emu::shuffle(mask, value, (lane) & 31, EMU_SITE)
#define __shfl_xor_sync(mask, value, bits) emu::shuffle(mask, value, emu::self->lane ^ (bits), EMU_SITE)
#define __shfl_down_sync(mask, value, by) \
    emu::shuffle(mask, value, emu::self->lane + (by) < 32 ? emu::self->lane + (by) : emu::self->lane, EMU_SITE)
#define __shfl_up_sync(mask, value, by) \
    emu::shuffle(mask, value, emu::self->lane >= (by) ? emu::self->lane - (by) : emu::self->lane, EMU_SITE)
#define __ballot_sync(mask, vote) emu::ballot(mask, vote, EMU_SITE)
#define __any_sync(mask, vote) (emu::ballot(mask, vote, EMU_SITE) != 0)
#define __all_sync(mask, vote) (emu::ballot(mask, vote, EMU_SITE) == (mask))

static inline float __fmul_rn(float a, float b) { return emu::unfused(a * b); }
static inline float __fadd_rn(float a, float b) { return emu::unfused(a + b); }
static inline float __fsub_rn(float a, float b) { return emu::unfused(a - b); }
static inline float __fdiv_rn(float a, float b) { return emu::unfused(a / b); }
static inline float __frcp_rn(float a) { return emu::unfused(1.0f / a); }
static inline float __fsqrt_rn(float a) { return emu::unfused(sqrtf(a)); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
#define __expf(a) expf(a)  // glibc declares these names
#define __logf(a) logf(a)
static inline float __fdividef(float a, float b) { return a / b; }
static inline unsigned __float_as_uint(float a) { unsigned bits; memcpy(&bits, &a, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float a; memcpy(&a, &bits, 4); return a; }
static inline int __float_as_int(float a) { return int(__float_as_uint(a)); }
static inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline unsigned __brev(unsigned bits) {
    unsigned turned = 0;
    for (int i = 0; i < 32; i++) turned |= (bits >> i & 1) << (31 - i);
    return turned;
}
// Byte `i` of the result is the byte of `low | high << 32` that nibble `i` of the selector names, or its sign throughout.
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t all = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> 4 * i & 15;
        unsigned byte = unsigned(all >> 8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
template <class T>
static inline T __ldg(const T* address) { return *address; }
template <class T>
static inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
static inline T max(T a, T b) { return a < b ? b : a; }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Atomics on integers only: float atomics would make the order of sums depend on time.
static inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
static inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
static inline int atomicOr(int* address, int value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
static inline int atomicCAS(int* address, int expected, int value) {
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
static inline int atomicMax(int* address, int value) {
    int old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
