// The backward pass of attention_hopper.cu, for sm_90a: what attention_tensor.cu does, in three launches. The formulas are those of
// attention.cu.
//
//   hopper_attention_backward_queries_head<D>   dq = scale · dS K          rows: queries, all heads of a group; keys pass through
//   hopper_attention_backward_values_head<D>    dv = Pᵀ dO                 rows: keys; queries of each head of the group pass through
//   hopper_attention_backward_keys_head<D>      dk = scale · dSᵀ Q         the same
//
// Tensors: q, do [T, H, D], k, v [T, K, D] bf16 by maps; lse, δ [T, H] f32; tiles i32 [n, 5] (attention.cuh); dq, dk, dv bf16. Limits are
// those of attention_hopper.cu.
//
// Work for each pair of query and visible key of a head: 3 D multiply-adds for dq, 2 D for dv, 3 D for dk. Bytes: what stays once; what
// passes once for each tile that stays, out of the second-level cache.
//
// Decomposition: as forward, tiles of 128 rows that stay and smaller ones that pass, of two tensors each:
//
//             stay      pass      scores        slopes       result
//   queries   Q, dO     K, V      S = Q Kᵀ      dP = dO Vᵀ   dq += dS K
//   values    K         Q, dO     Sᵀ = K Qᵀ     –            dv += Pᵀ dO
//   keys      K, V      Q, dO     Sᵀ = K Qᵀ     dPᵀ = V dOᵀ  dk += dSᵀ Q
//
// with P = e^(scale S − lse) and dS = P (dP − δ). Scores come with the rows that stay as rows, so P and dS leave the accumulators as the
// left factor of the last product, and nothing is exchanged between groups. dv and dk are two launches, each with its own scores, 5 products
// where 4 would do: together they would not fit a thread's registers at heads of 256, and two groups that share rows would have to
// give each other weights through shared memory, with barriers for every tile.
//
// A group begins scores and slopes together and makes the exponentials while the slopes are under way; the products of the other group
// run beside all of it. A stage is one tile of both tensors, with lse and δ of its queries in dv and dk: it is full when its bytes have
// come and empty when all eight multiplying warps have done with it.
//
//   head        keys that pass, stages (dq)   queries, stages (dv)   queries, stages (dk)
//    64          96, 4                          96, 4                  96, 4
//    80 to 128   96, 3                          96, 3                  96, 3
//   256          48, 2                          80, 2                  48, 2
//
// Numerics: as attention_tensor.cu. Rows that are not the document's are zeros where they are a right factor, so what they would add is
// zero; those that stay are not stored. Bits depend on the document alone.

#include "attention_hopper.cuh"

// Of the copying and of the multiplying threads: 128 · 40 + 256 · 232 are what 384 threads of 168 have.
constexpr i32 COPY_REGISTERS = 40;
constexpr i32 MULTIPLY_REGISTERS = 232;
static_assert(WARP_GROUP * COPY_REGISTERS + 2 * WARP_GROUP * MULTIPLY_REGISTERS <= BLOCK_REGISTERS, "more registers than given back");

enum Gradient { QUERIES, VALUES, KEYS };

// The sizes of one instance: head, rows that pass, stages.
template <Gradient OF_, i32 HEAD_, i32 PASSING_, i32 STAGES_>
struct Sizes {
    static constexpr Gradient OF = OF_;
    static constexpr i32 HEAD = HEAD_, PASSING = PASSING_, STAGES = STAGES_;
    // Whether there are slopes, and the second tensor that stays; whether queries pass, and with them lse and δ.
    static constexpr bool SLOPES = OF != VALUES, BY_COLUMN = OF != QUERIES;
    static constexpr i32 STAYING_BYTES = SPANS<HEAD> * ROWS * SPAN_BYTES, TILE_BYTES = SPANS<HEAD> * PASSING * SPAN_BYTES;
    static constexpr i32 STAGE_BYTES = 2 * TILE_BYTES;
    // Where things lie; barriers are before what stays.
    static constexpr i32 STAYING = SWIZZLE_REPEAT, RING = STAYING + (SLOPES ? 2 : 1) * STAYING_BYTES;
    static constexpr i32 STATISTICS = RING + STAGES * STAGE_BYTES;
    static_assert(HEAD % 16 == 0 && PASSING % 16 == 0, "whole steps of wgmma");
    static_assert(PASSING * SPAN_BYTES % SWIZZLE_REPEAT == 0, "tiles begin where the swizzle does");
};

// What a kernel gets. Maps `staying` are in boxes of tiles that stay, `passing` of those that pass, `rows` of one row.
struct Operands {
    const TensorMap *staying[2], *passing[2], *rows[2];
    const f32 *lse, *delta;
    const i32* tiles;
    bf16* out;
    i32 tile_count, group, kv_heads, dim;
    f32 scale;

    // Tokens of a tile that stays.
    template <class S>
    DEVICE i32 tokens() const {
        return S::BY_COLUMN ? ROWS : ROWS / group;
    }
    DEVICE i32 heads() const { return group * kv_heads; }
};

// The block's shared memory.
template <class S>
struct Memory {
    u8* base;

    DEVICE u8* staying(i32 tensor) const { return base + S::STAYING + tensor * S::STAYING_BYTES; }
    DEVICE u8* passing(i32 slot, i32 tensor) const { return base + S::RING + slot * S::STAGE_BYTES + tensor * S::TILE_BYTES; }
    // Of the queries of a stage: lse · log₂ e, then δ.
    DEVICE f32* statistics(i32 slot) const { return reinterpret_cast<f32*>(base + S::STATISTICS) + slot * 2 * S::PASSING; }
    DEVICE u64* barrier(i32 index) const { return reinterpret_cast<u64*>(base) + index; }
    DEVICE u64* staying_full() const { return barrier(0); }
    DEVICE u64* staying_empty() const { return barrier(1); }
    DEVICE u64* full(i32 slot) const { return barrier(2 + slot); }
    DEVICE u64* empty(i32 slot) const { return barrier(2 + S::STAGES + slot); }

    // Makes the barriers. All threads call it.
    DEVICE void prepare() const {
        if (threadIdx.x == 0) {
            barrier_init(staying_full(), 1), barrier_init(staying_empty(), MULTIPLYING_WARPS);
            for (i32 slot = 0; slot < S::STAGES; slot++)
                barrier_init(full(slot), 1), barrier_init(empty(slot), MULTIPLYING_WARPS);
            barriers_publish();
        }
        __syncthreads();
    }
};

// Which rows of which head pass: keys from the document's first on; or, head by head of the group, the queries that see a key of the tile.
template <class S>
struct Walk {
    i32 head, row, first, end, start;  // the row within its document, which begins at row `start` of the tensor

    DEVICE Walk(const Job& job, i32 group) {
        head = S::BY_COLUMN ? job.kv_head * group : job.kv_head;
        first = S::BY_COLUMN ? job.tile.first : 0;
        end = S::BY_COLUMN ? job.tile.queries : job.visible();
        start = S::BY_COLUMN ? job.tile.query_start : job.tile.key_start;
        row = first;
    }
    // How many tiles pass.
    DEVICE i32 count(i32 group) const { return (end - first + S::PASSING - 1) / S::PASSING * (S::BY_COLUMN ? group : 1); }
    DEVICE void next() {
        row += S::PASSING;
        if (S::BY_COLUMN && row >= end) row = first, head++;
    }
};

// ---- the copying warp ----------------------------------------------------------------------------------------------

template <class S>
DEVICE void copy_staying(const Memory<S>& memory, const Operands& of, const Job& job) {
    constexpr i32 TENSORS = S::SLOPES ? 2 : 1;
    u64* full = memory.staying_full();
    i32 rows = S::BY_COLUMN ? ROWS : job.tokens * of.group;
    i32 head = S::BY_COLUMN ? job.kv_head : job.kv_head * of.group;
    i32 first = (S::BY_COLUMN ? job.tile.key_start : job.tile.query_start) + job.tile.first;
    barrier_expect(full, u32(TENSORS * SPANS<S::HEAD> * rows * SPAN_BYTES));
#pragma unroll
    for (i32 tensor = 0; tensor < TENSORS; tensor++)
        for (i32 span = 0; span < SPANS<S::HEAD>; span++)
            copy_box(memory.staying(tensor) + span * ROWS * SPAN_BYTES, of.staying[tensor], span * SPAN, head, first, full);
    barrier_arrive(full);
}

// lse and δ of the queries that pass; zeros beyond the document.
template <class S>
DEVICE void copy_statistics(const Memory<S>& memory, const Operands& of, const Walk<S>& walk, i32 slot) {
    f32* to = memory.statistics(slot);
    for (i32 i = lane_index(); i < S::PASSING; i += WARP_LANES) {
        bool exists = walk.row + i < walk.end;
        i64 at = i64(walk.start + walk.row + i) * of.heads() + walk.head;
        to[i] = exists ? of.lse[at] * LOG2_E : 0.0f;
        if constexpr (S::SLOPES) to[S::PASSING + i] = exists ? of.delta[at] : 0.0f;
    }
}

template <class S>
DEVICE void copy_tiles(const Memory<S>& memory, const Operands& of) {
    RingPlace at;
    u32 turn = 1;  // parity of the last phase of what stays
    bool leads = lane_index() == 0;
    for_each_job(of.tiles, of.tile_count, of.kv_heads, of.tokens<S>(), [&](const Job& job) {
        barrier_wait(memory.staying_empty(), turn);
        turn ^= 1;
        if (leads) copy_staying(memory, of, job);
        Walk<S> walk(job, of.group);
        i32 length = S::BY_COLUMN ? job.tile.queries : job.tile.keys;
        for (i32 left = walk.count(of.group); left > 0; left--) {
            barrier_wait(memory.empty(at.slot), at.parity ^ 1);
            u64* full = memory.full(at.slot);
            if (leads) barrier_expect(full, S::STAGE_BYTES);
#pragma unroll
            for (i32 tensor = 0; tensor < 2; tensor++)
                copy_rows<S::HEAD, S::PASSING>(memory.passing(at.slot, tensor), of.passing[tensor], of.rows[tensor], walk.head,
                                               walk.start + walk.row, length - walk.row, false, full);
            if constexpr (S::BY_COLUMN) copy_statistics(memory, of, walk, at.slot);
            __syncwarp();
            if (leads) barrier_arrive(full);
            walk.next();
            at.advance<S::STAGES>();
        }
    });
}

// ---- the multiplying groups ----------------------------------------------------------------------------------------

// lse · log₂ e and δ of this thread's two rows, where rows are queries.
struct RowStatistics {
    f32 lse[2], delta[2];

    RowStatistics() = default;

    DEVICE RowStatistics(const Operands& of, const Multiplier& me, const Job& job) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 token = me.row(half) / of.group;
            bool exists = token < job.tokens && job.tile.first + token < job.tile.queries;
            i64 row = i64(job.tile.query_start + job.tile.first + token) * of.heads();
            i64 at = row + job.kv_head * of.group + me.row(half) % of.group;
            lse[half] = exists ? of.lse[at] * LOG2_E : 0.0f;
            delta[half] = exists ? of.delta[at] : 0.0f;
        }
    }
};

// Weights of queries and keys that do not see each other become zero. Column c of a row is seen up to, or from, the row's `border` on.
template <class S, i32 COUNT>
DEVICE void mask(f32 (&weights)[COUNT], const Multiplier& me, const i32 (&border)[2]) {
#pragma unroll
    for (i32 i = 0; i < COUNT; i++) {
        i32 column = i / 4 * 8 + 2 * me.t + i % 2, limit = border[i / 2 % 2];
        if (S::BY_COLUMN ? column < limit : column > limit) weights[i] = 0.0f;
    }
}

// One tile of this group's rows.
template <class S>
DEVICE void differentiate(const Memory<S>& memory, const Operands& of, const Multiplier& me, const Job& job, RingPlace& at) {
    constexpr i32 HEAD = S::HEAD, PASSING = S::PASSING, COUNT = PASSING / 2;
    // The right factor of the last product is a tile of the first tensor that passes, or of the second for dv.
    constexpr i32 RIGHT = S::SLOPES ? 0 : 1;
    u64 left = me.left(memory.staying(0)), other_left = me.left(memory.staying(S::SLOPES ? 1 : 0));
    u64 passing = factor(memory.passing(0, 0), SWIZZLE_REPEAT);
    u64 right = factor(memory.passing(0, RIGHT), SWIZZLE_REPEAT, PASSING * SPAN_BYTES);
    f32 scale_log2 = of.scale * LOG2_E;
    // Of this thread's rows, and of the warp's row that a mask concerns first: the last key that a query sees, or, where rows are keys,
    // the first query that sees one.
    i32 own[2], first_of_warp;
#pragma unroll
    for (i32 half = 0; half < 2; half++)
        own[half] = S::BY_COLUMN ? job.tile.first + me.row(half) : job.first_seen() + me.row(half) / of.group;
    first_of_warp = S::BY_COLUMN ? job.tile.first + me.first_row + 15 : job.first_seen() + me.first_row / of.group;

    f32 result[HEAD / 2], scores[COUNT], slopes[S::SLOPES ? COUNT : 1];
    u32 weights[PASSING / 16][4];
#pragma unroll
    for (i32 i = 0; i < HEAD / 2; i++) result[i] = 0.0f;
    RowStatistics rows = S::BY_COLUMN ? RowStatistics{} : RowStatistics(of, me, job);
    Walk<S> walk(job, of.group);
#pragma unroll 1
    for (i32 left_over = walk.count(of.group); left_over > 0; left_over--) {
        barrier_wait(memory.full(at.slot), at.parity);
        u64 stage = moved(passing, at.slot * S::STAGE_BYTES);
        begin_scores<HEAD, PASSING>(scores, left, stage);
        if constexpr (S::SLOPES) begin_scores<HEAD, PASSING>(slopes, other_left, moved(stage, S::TILE_BYTES));
        products_wait<S::SLOPES ? 1 : 0>();
        pin(scores);
        const f32* of_columns = memory.statistics(at.slot) + 2 * me.t;
#pragma unroll
        for (i32 i = 0; i < COUNT; i++) {
            f32 lse = S::BY_COLUMN ? of_columns[i / 4 * 8 + i % 2] : rows.lse[i / 2 % 2];
            scores[i] = power_of_two(scores[i] * scale_log2 - lse);
        }
        pin(scores);
        i32 border[2] = {own[0] - walk.row, own[1] - walk.row};
        if (S::BY_COLUMN ? walk.row < first_of_warp : walk.row + PASSING - 1 > first_of_warp) mask<S>(scores, me, border);
        if constexpr (S::SLOPES) {
            products_wait<0>();
            pin(slopes);
#pragma unroll
            for (i32 i = 0; i < COUNT; i++) {
                f32 delta = S::BY_COLUMN ? of_columns[PASSING + i / 4 * 8 + i % 2] : rows.delta[i / 2 % 2];
                scores[i] *= slopes[i] - delta;
            }
        }
        round_weights(weights, scores);
        begin_result<HEAD, PASSING>(result, weights, moved(right, at.slot * S::STAGE_BYTES));
        products_wait<0>();
        pin(result);
        release(memory.empty(at.slot));
        walk.next();
        at.advance<S::STAGES>();
    }
    release(memory.staying_empty());

    f32 scale = S::SLOPES ? of.scale : 1.0f;
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 row = me.row(half), token = S::BY_COLUMN ? row : row / of.group;
        i32 first = (S::BY_COLUMN ? job.tile.key_start : job.tile.query_start) + job.tile.first;
        bool exists = token < job.tokens && job.tile.first + token < (S::BY_COLUMN ? job.tile.keys : job.tile.queries);
        i64 place = S::BY_COLUMN ? i64(first + token) * of.kv_heads + job.kv_head
                                 : i64(first + token) * of.heads() + job.kv_head * of.group + row % of.group;
        store_row(result, half, scale, of.out + place * of.dim, of.dim, me.t, exists);
    }
}

template <class S>
DEVICE void attention_backward(const Operands& of) {
    DYNAMIC_SHARED(base);
    Memory<S> memory{base};
    memory.prepare();
    if (threadIdx.x < WARP_GROUP) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x < WARP_LANES) copy_tiles<S>(memory, of);
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        Multiplier me;
        RingPlace at;
        u32 turn = 0;
        for_each_job(of.tiles, of.tile_count, of.kv_heads, of.tokens<S>(), [&](const Job& job) {
            barrier_wait(memory.staying_full(), turn);
            turn ^= 1;
            differentiate<S>(memory, of, me, job, at);
        });
    }
}

// Name, what it makes, head size, rows that pass, stages.
#define HOPPER_GRADIENT(name, of, head, passing, stages)                                                                     \
    ENTRY(ATTENTION_THREADS, 1)                                                                                              \
    hopper_attention_backward_##name##_head##head##_bf16(                                                                    \
        MAP staying, MAP other_staying, MAP passed, MAP other_passed, MAP row, MAP other_row, const f32* __restrict__ lse,   \
        const f32* __restrict__ delta, const i32* __restrict__ tiles, bf16* __restrict__ out, i32 tile_count, i32 group,     \
        i32 kv_heads, i32 dim, f32 scale) {                                                                                  \
        attention_backward<Sizes<of, head, passing, stages>>({{&staying, &other_staying}, {&passed, &other_passed},          \
                                                              {&row, &other_row}, lse, delta, tiles, out, tile_count, group, \
                                                              kv_heads, dim, scale});                                        \
    }
HOPPER_GRADIENT(queries, QUERIES, 64, 96, 4)
HOPPER_GRADIENT(values, VALUES, 64, 96, 4)
HOPPER_GRADIENT(keys, KEYS, 64, 96, 4)
HOPPER_GRADIENT(queries, QUERIES, 80, 96, 3)
HOPPER_GRADIENT(values, VALUES, 80, 96, 3)
HOPPER_GRADIENT(keys, KEYS, 80, 96, 3)
HOPPER_GRADIENT(queries, QUERIES, 96, 96, 3)
HOPPER_GRADIENT(values, VALUES, 96, 96, 3)
HOPPER_GRADIENT(keys, KEYS, 96, 96, 3)
HOPPER_GRADIENT(queries, QUERIES, 128, 96, 3)
HOPPER_GRADIENT(values, VALUES, 128, 96, 3)
HOPPER_GRADIENT(keys, KEYS, 128, 96, 3)
HOPPER_GRADIENT(queries, QUERIES, 256, 48, 2)
HOPPER_GRADIENT(values, VALUES, 256, 80, 2)
HOPPER_GRADIENT(keys, KEYS, 256, 48, 2)
