// Element-wise ops: copies that convert, the residual sum, SwiGLU.
//
//   convert           target[i] = source[i]                                             rounded to nearest even
//   add_assign        y = y + x
//   swiglu_forward    y = silu(gate) · up,  silu(g) = g σ(g)
//   swiglu_backward   dup = dy · silu(gate),  dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))
//
// Tensors: all of one call have the same number of elements, `count`, and lie contiguously.
//
// Bytes: every operand once. For n elements of s bytes: convert n (s + s'), add_assign 3 n s, swiglu 3 n s forward and 5 n s
// backward. All are limited by memory.
//
// Decomposition: a thread does a pack of eight elements, which is one 16-byte access per bf16 operand and two per f32 operand;
// the last pack may be short. A warp's accesses are contiguous: 512 bytes of bf16.
//
// Numerics: f32 arithmetic on widened operands, one rounding when the result is stored.

#include "common.cuh"

constexpr i32 THREADS = 256;

template <class S, class T>
DEVICE void convert(T* target, const S* source, i64 count) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    store_pack(target, first, count, true, load_pack(source, first, count, true));
}

template <class A>
DEVICE void add_assign(A* y, const A* x, i64 count) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack sum = load_pack(y, first, count, true);
    Pack added = load_pack(x, first, count, true);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) sum.at[i] += added.at[i];
    store_pack(y, first, count, true, sum);
}

template <class A>
DEVICE void swiglu_forward(const A* gate, const A* up, A* y, i64 count) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack g = load_pack(gate, first, count, true);
    Pack u = load_pack(up, first, count, true);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) u.at[i] *= g.at[i] * logistic(g.at[i]);
    store_pack(y, first, count, true, u);
}

template <class A>
DEVICE void swiglu_backward(const A* gate, const A* up, const A* dy, A* dgate, A* dup, i64 count) {
    i64 first = global_thread() * PACK;
    if (first >= count) return;
    Pack g = load_pack(gate, first, count, true);
    Pack u = load_pack(up, first, count, true);
    Pack d = load_pack(dy, first, count, true);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) {
        f32 sigma = logistic(g.at[i]);
        u.at[i] = d.at[i] * u.at[i] * sigma * (1.0f + g.at[i] * (1.0f - sigma));
        d.at[i] = d.at[i] * g.at[i] * sigma;
    }
    store_pack(dgate, first, count, true, u);
    store_pack(dup, first, count, true, d);
}

#define CONVERT(S, T)                                                                                         \
    ENTRY(THREADS) convert_##S##_##T(T* __restrict__ target, const S* __restrict__ source, i64 count) {       \
        convert<S, T>(target, source, count);                                                                 \
    }
CONVERT(f32, f32)
CONVERT(f32, bf16)
CONVERT(bf16, f32)
CONVERT(bf16, bf16)
CONVERT(f16, f32)
CONVERT(f16, bf16)

#define ACTIVATION(A)                                                                                         \
    ENTRY(THREADS) add_assign_##A(A* __restrict__ y, const A* __restrict__ x, i64 count) {                    \
        add_assign<A>(y, x, count);                                                                           \
    }                                                                                                         \
    ENTRY(THREADS)                                                                                            \
    swiglu_forward_##A(const A* __restrict__ gate, const A* __restrict__ up, A* __restrict__ y, i64 count) {  \
        swiglu_forward<A>(gate, up, y, count);                                                                \
    }                                                                                                         \
    ENTRY(THREADS)                                                                                            \
    swiglu_backward_##A(const A* __restrict__ gate, const A* __restrict__ up, const A* __restrict__ dy,       \
                        A* __restrict__ dgate, A* __restrict__ dup, i64 count) {                              \
        swiglu_backward<A>(gate, up, dy, dgate, dup, count);                                                  \
    }
ACTIVATION(f32)
ACTIVATION(bf16)
