// Moving rows and columns: the embedding's gather, rows into a cache, columns between fused and separate projections, and
// rotary embedding.
//
//   gather_rows    y[t] = table[ids[t]]                             table [V, C], ids [T], y [T, C]
//   copy_rows      target[offset + i] = source[i]                   i over the elements of source
//   copy_columns   target[n][g·S' + to + c] = source[n][g·S + from + c]   for groups g and c < width; S, S' group strides
//   rope           y[p] = x[p] cos θ − x[p + P] sin θ,  y[p + P] = x[p + P] cos θ + x[p] sin θ,  θ = t · f_p,  in place
//
// Tensors: activations f32 or bf16; ids and positions i32; cos and sin f32 [positions, P].
//
// Bytes: what is read and written, once. Limited by memory.
//
// Decomposition: gather: a warp per row in packs of eight elements. Columns and rope: a thread per element or pair, since their
// starts have no alignment in general; neighbours in a warp are neighbours in memory.
//
// Numerics: copies are exact (gather widens or rounds once, to nearest even); rope computes in f32.
//
// Faults: an id outside the table or a position outside the angles is reported (report_fault) and the row left as it was.

#include "common.cuh"

constexpr i32 THREADS = 256;

template <class W, class A>
DEVICE void gather_rows(const W* table, const i32* ids, A* y, i64 tokens, i32 vocabulary, i32 width, i32* faults, i32 fault) {
    i64 token = i64(blockIdx.x) * (THREADS / WARP_LANES) + warp_index();
    if (token >= tokens) return;
    i32 id = ids[token];
    if (id < 0 || id >= vocabulary) {
        if (lane_index() == 0) report_fault(faults, fault, id);
        return;
    }
    bool aligned = width % PACK == 0;
    const W* from = table + i64(id) * width;
    A* to = y + token * width;
    for (i32 first = lane_index() * PACK; first < width; first += WARP_LANES * PACK)
        store_pack(to, first, width, aligned, load_pack(from, first, width, aligned));
}

template <class A>
DEVICE void copy_rows(const A* source, A* target, i64 offset, i64 count) {
    i64 i = global_thread();
    if (i < count) target[offset + i] = source[i];
}

template <class A>
DEVICE void copy_columns(const A* source, A* target, i64 groups, i32 width, i32 source_stride, i32 source_first,
                         i32 target_stride, i32 target_first) {
    i64 i = global_thread();
    if (i >= groups * width) return;
    i64 group = i / width;
    i32 column = i32(i % width);
    target[group * target_stride + target_first + column] = source[group * source_stride + source_first + column];
}

template <class A>
DEVICE void rope(A* x, const i32* positions, const f32* cos, const f32* sin, i64 tokens, i32 heads, i32 dim, i32 pairs,
                 i32 table_rows, f32 sign, i32* faults, i32 fault) {
    i64 i = global_thread();
    if (i >= tokens * heads * pairs) return;
    i32 pair = i32(i % pairs);
    i64 row = i / pairs;  // token and head
    i64 token = row / heads;
    i32 position = positions[token];
    if (position < 0 || position >= table_rows) {
        report_fault(faults, fault, position);
        return;
    }
    f32 c = cos[i64(position) * pairs + pair], s = sign * sin[i64(position) * pairs + pair];
    A* low = x + row * dim + pair;
    A* high = low + pairs;
    f32 a = to_f32(*low), b = to_f32(*high);
    *low = from_f32<A>(a * c - b * s);
    *high = from_f32<A>(b * c + a * s);
}

#define GATHER(W, A)                                                                                                     \
    ENTRY(THREADS)                                                                                                       \
    gather_rows_##W##_##A(const W* __restrict__ table, const i32* __restrict__ ids, A* __restrict__ y, i64 tokens,       \
                          i32 vocabulary, i32 width, i32* __restrict__ faults, i32 fault) {                              \
        gather_rows<W, A>(table, ids, y, tokens, vocabulary, width, faults, fault);                                      \
    }
GATHER(f32, f32)
GATHER(f32, bf16)
GATHER(bf16, f32)
GATHER(bf16, bf16)
GATHER(f16, f32)
GATHER(f16, bf16)

#define ACTIVATION(A)                                                                                                    \
    ENTRY(THREADS) copy_rows_##A(const A* __restrict__ source, A* __restrict__ target, i64 offset, i64 count) {          \
        copy_rows<A>(source, target, offset, count);                                                                     \
    }                                                                                                                    \
    ENTRY(THREADS)                                                                                                       \
    copy_columns_##A(const A* __restrict__ source, A* __restrict__ target, i64 groups, i32 width, i32 source_stride,     \
                     i32 source_first, i32 target_stride, i32 target_first) {                                            \
        copy_columns<A>(source, target, groups, width, source_stride, source_first, target_stride, target_first);        \
    }                                                                                                                    \
    ENTRY(THREADS)                                                                                                       \
    rope_##A(A* __restrict__ x, const i32* __restrict__ positions, const f32* __restrict__ cos,                          \
             const f32* __restrict__ sin, i64 tokens, i32 heads, i32 dim, i32 pairs, i32 table_rows, f32 sign,           \
             i32* __restrict__ faults, i32 fault) {                                                                      \
        rope<A>(x, positions, cos, sin, tokens, heads, dim, pairs, table_rows, sign, faults, fault);                     \
    }
ACTIVATION(f32)
ACTIVATION(bf16)
