// Causal attention over packed documents by Hopper's tensor cores: what attention_tensor.cu does forward, for sm_90a. The formulas
// are those of attention.cu, the method is FlashAttention's (Dao 2023, arXiv 2307.08691), its overlap within a warp group
// FlashAttention-3's (Shah et al. 2024, arXiv 2407.08608).
//
//   hopper_attention_forward_head<D>     head sizes up to 64, 80, 96, 128 and 256
//
// Tensors: q [Tq, H, D], k and v [Tk, K, D] bf16 by maps; tiles i32 [n, 5] (attention.cuh); out [Tq, H, D] bf16; lse [Tq, H] f32. D is a
// multiple of 8 (rows begin at 16 bytes, which the copy engine wants), H / K at most 128, the scale above zero; attention_tensor.cu
// does the rest. Elements of a row beyond D are zeros by the maps, so a head size between two instances costs time and nothing else.
//
// Work for each pair of query and visible key of a head: 2 D multiply-adds. Bytes: q and out once; k and v of the document once for
// each tile, out of the second-level cache.
//
// Decomposition: a block stays on its multiprocessor and does tile after tile, of three warp groups: one copies, two multiply. A tile is
// 128 rows, and a row is one query head of one token: all `group` = H / K query heads of a key/value head, for 128 / group tokens. So a
// tile is full however short a document is (16 tokens fill it for a group of 8), keys are read once for the group, and few rows of a
// tile lie on its diagonal. The first multiplying group has rows 0 to 63, the second the others; they never wait for each other.
//
// Keys and values pass through a ring of stages, each with barriers of its own for both, so that the next scores begin before the last
// values are done with. A multiplying group begins S' = Q K'ᵀ of the next keys, then O += P V of the last, and does the softmax of S'
// beside the latter; the other group's products fill what is left of the tensor cores. The copying warp runs ahead over the ends of
// tiles: the next one's queries come while this one's last weights are multiplied and its result is stored.
//
//   head    keys   stages   shared memory   registers of O, S, P
//     64     128        4        145 KB      32, 64, 32
//     80     128        3        225 KB      40, 64, 32     rows are 128 elements in shared memory, of which products read 80
//     96     128        3        225 KB      48, 64, 32
//    128     128        3        225 KB      64, 64, 32
//    256      80        2        225 KB     128, 40, 20
//
// Shared memory: rows of 64 elements, swizzled over 128 bytes; a tile of longer rows is several such, one behind the other. Q is the left
// factor and K the right one, the depth along their rows. P comes out of the accumulators as the left factor in registers; V is a right
// factor whose rows are the depth, which wgmma transposes as it reads.
//
// Keys are masked only where a warp's first query does not see all of a tile. Rows of other documents may follow a document's last one:
// as keys they are masked, as queries they are not stored, and as values, which a weight of zero does not keep from being a NaN, they
// are not copied: the document's last tile of values comes row by row, zeros beyond.
//
// Numerics: as attention_tensor.cu: sums in f32, exponentials to base 2 with the scale folded in, P rounded to bf16 as a factor, row
// sums of the unrounded P. Bits depend on the document alone.

#include "attention_hopper.cuh"

// Of the copying and of the multiplying threads: 128 · 24 + 256 · 240 are what 384 threads of 168 have.
constexpr i32 COPY_REGISTERS = 24;
constexpr i32 MULTIPLY_REGISTERS = 240;
static_assert(WARP_GROUP * COPY_REGISTERS + 2 * WARP_GROUP * MULTIPLY_REGISTERS <= BLOCK_REGISTERS, "more registers than given back");

// The sizes of one instance.
template <i32 HEAD_, i32 KEYS_, i32 STAGES_>
struct Sizes {
    static constexpr i32 HEAD = HEAD_, KEYS = KEYS_, STAGES = STAGES_;
    static constexpr i32 QUERY_BYTES = SPANS<HEAD> * ROWS * SPAN_BYTES, KEY_BYTES = SPANS<HEAD> * KEYS * SPAN_BYTES;
    // Where things lie; barriers are before the queries.
    static constexpr i32 QUERIES = SWIZZLE_REPEAT, RING = QUERIES + QUERY_BYTES;
    static_assert(HEAD % 16 == 0 && KEYS % 16 == 0, "whole steps of wgmma");
    static_assert(KEYS * SPAN_BYTES % SWIZZLE_REPEAT == 0, "tiles begin where the swizzle does");
};

// What is attended to, as a kernel gets it.
struct Operands {
    const TensorMap *q, *k, *v;
    const TensorMap* v_row;  // the same values, in boxes of one row
    const i32* tiles;
    bf16* out;
    f32* lse;
    i32 tile_count, group, kv_heads, dim;
    f32 scale;
};

// The block's shared memory.
template <class S>
struct Memory {
    u8* base;

    DEVICE u8* queries() const { return base + S::QUERIES; }
    DEVICE u8* keys(i32 slot) const { return base + S::RING + 2 * slot * S::KEY_BYTES; }
    DEVICE u8* values(i32 slot) const { return keys(slot) + S::KEY_BYTES; }
    DEVICE u64* barrier(i32 index) const { return reinterpret_cast<u64*>(base) + index; }
    DEVICE u64* queries_full() const { return barrier(0); }
    DEVICE u64* queries_empty() const { return barrier(1); }
    DEVICE u64* keys_full(i32 slot) const { return barrier(2 + slot); }
    DEVICE u64* keys_empty(i32 slot) const { return barrier(2 + S::STAGES + slot); }
    DEVICE u64* values_full(i32 slot) const { return barrier(2 + 2 * S::STAGES + slot); }
    DEVICE u64* values_empty(i32 slot) const { return barrier(2 + 3 * S::STAGES + slot); }

    // Makes the barriers. All threads call it.
    DEVICE void prepare() const {
        if (threadIdx.x == 0) {
            barrier_init(queries_full(), 1), barrier_init(queries_empty(), MULTIPLYING_WARPS);
            for (i32 slot = 0; slot < S::STAGES; slot++) {
                barrier_init(keys_full(slot), 1), barrier_init(keys_empty(slot), MULTIPLYING_WARPS);
                barrier_init(values_full(slot), 1), barrier_init(values_empty(slot), MULTIPLYING_WARPS);
            }
            barriers_publish();
        }
        __syncthreads();
    }
};

// ---- the copying warp ----------------------------------------------------------------------------------------------

template <class S>
DEVICE void copy_tiles(const Memory<S>& memory, const Operands& of) {
    RingPlace at;
    u32 turn = 1;  // parity of the queries' last phase
    bool leads = lane_index() == 0;
    if (leads) prefetch_map(of.q), prefetch_map(of.k), prefetch_map(of.v), prefetch_map(of.v_row);
    for_each_job(of.tiles, of.tile_count, of.kv_heads, ROWS / of.group, [&](const Job& job) {
        barrier_wait(memory.queries_empty(), turn);
        turn ^= 1;
        if (leads) {
            barrier_expect(memory.queries_full(), u32(SPANS<S::HEAD> * job.tokens * of.group * SPAN_BYTES));
            for (i32 span = 0; span < SPANS<S::HEAD>; span++)
                copy_box(memory.queries() + span * ROWS * SPAN_BYTES, of.q, span * SPAN, job.kv_head * of.group,
                         job.tile.query_start + job.tile.first, memory.queries_full());
            barrier_arrive(memory.queries_full());
        }
        auto copy = [&](u8* to, const TensorMap* map, i32 first, bool whole, u64* full, u64* empty) {
            barrier_wait(empty, at.parity ^ 1);
            if (leads) barrier_expect(full, S::KEY_BYTES);
            copy_rows<S::HEAD, S::KEYS>(to, map, of.v_row, job.kv_head, job.tile.key_start + first, job.tile.keys - first, whole,
                                        full);
            __syncwarp();
            if (leads) barrier_arrive(full);
        };
        for (i32 first = 0; first < job.visible(); first += S::KEYS) {
            copy(memory.keys(at.slot), of.k, first, true, memory.keys_full(at.slot), memory.keys_empty(at.slot));
            copy(memory.values(at.slot), of.v, first, false, memory.values_full(at.slot), memory.values_empty(at.slot));
            at.advance<S::STAGES>();
        }
    });
}

// ---- the multiplying groups ----------------------------------------------------------------------------------------

// Softmax as far as it has come, of the thread's two rows; the sums are of its own columns.
struct Softmax {
    f32 largest[2], sum[2];
};

// Turns scores into weights relative to the new maximum; what was summed before is to be multiplied by `correction`.
template <i32 COUNT>
DEVICE void advance(Softmax& softmax, f32 (&scores)[COUNT], f32 scale_log2, f32 (&correction)[2]) {
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        f32 highest = softmax.largest[half];
#pragma unroll
        for (i32 i = 2 * half; i < COUNT; i += 4) highest = max(highest, max(scores[i], scores[i + 1]));
        highest = lanes_max<4>(highest);
        correction[half] = power_of_two((softmax.largest[half] - highest) * scale_log2);
        f32 offset = highest * scale_log2, sum = 0.0f;
#pragma unroll
        for (i32 i = 2 * half; i < COUNT; i += 4) {
#pragma unroll
            for (i32 j = i; j < i + 2; j++) {
                scores[j] = power_of_two(scores[j] * scale_log2 - offset);
                sum += scores[j];
            }
        }
        softmax.sum[half] = softmax.sum[half] * correction[half] + sum;
        softmax.largest[half] = highest;
    }
}

// Scores of keys that a row does not see become −∞: those beyond `last`, of which the tile's first is `first_key`. Every row sees key 0,
// so no maximum is −∞ after the first tile.
template <i32 COUNT>
DEVICE void mask(f32 (&scores)[COUNT], const Multiplier& me, const i32 (&last)[2], i32 first_key) {
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 limit = last[half] - first_key - 2 * me.t;
#pragma unroll
        for (i32 i = 2 * half; i < COUNT; i += 4) {
            if (2 * i - 4 * half > limit) scores[i] = -infinity();
            if (2 * i - 4 * half + 1 > limit) scores[i + 1] = -infinity();
        }
    }
}

// One tile of this group's rows.
template <class S>
DEVICE void attend(const Memory<S>& memory, const Operands& of, const Multiplier& me, const Job& job, RingPlace& at) {
    u64 queries = me.left(memory.queries()), keys = factor(memory.keys(0), SWIZZLE_REPEAT);
    u64 values = factor(memory.values(0), SWIZZLE_REPEAT, S::KEYS * SPAN_BYTES);
    f32 scale_log2 = of.scale * LOG2_E;
    i32 last[2] = {job.first_seen() + me.row(0) / of.group, job.first_seen() + me.row(1) / of.group};
    i32 least = job.first_seen() + me.first_row / of.group, count = (job.visible() + S::KEYS - 1) / S::KEYS;

    f32 result[S::HEAD / 2], scores[S::KEYS / 2], correction[2];
    u32 weights[S::KEYS / 16][4];
    Softmax softmax{{-infinity(), -infinity()}, {0.0f, 0.0f}};
#pragma unroll
    for (i32 i = 0; i < S::HEAD / 2; i++) result[i] = 0.0f;

    barrier_wait(memory.keys_full(at.slot), at.parity);
    begin_scores<S::HEAD, S::KEYS>(scores, queries, moved(keys, 2 * at.slot * S::KEY_BYTES));
    products_wait<0>();
    pin(scores);
    release(memory.keys_empty(at.slot));
    if (S::KEYS - 1 > least) mask(scores, me, last, 0);
    advance(softmax, scores, scale_log2, correction);
    round_weights(weights, scores);
#pragma unroll 1
    for (i32 index = 1; index < count; index++) {
        i32 before = at.slot;
        u32 parity = at.parity;
        at.advance<S::STAGES>();
        barrier_wait(memory.keys_full(at.slot), at.parity);
        begin_scores<S::HEAD, S::KEYS>(scores, queries, moved(keys, 2 * at.slot * S::KEY_BYTES));
        barrier_wait(memory.values_full(before), parity);
        begin_result<S::HEAD, S::KEYS>(result, weights, moved(values, 2 * before * S::KEY_BYTES));
        products_wait<1>();
        pin(scores);
        release(memory.keys_empty(at.slot));
        if ((index + 1) * S::KEYS - 1 > least) mask(scores, me, last, index * S::KEYS);
        advance(softmax, scores, scale_log2, correction);
        pin(scores);
        // Maxima settle early in a row, and a factor of 1 changes nothing. The wait is on both ways because the compiler would otherwise
        // move it before the exponentials, which are to run beside what is waited for.
        if (lanes_saying(correction[0] != 1.0f || correction[1] != 1.0f) != 0) {
            products_wait<0>();
            pin(result);
#pragma unroll
            for (i32 i = 0; i < S::HEAD / 2; i++) result[i] *= correction[i / 2 % 2];
        } else {
            products_wait<0>();
            pin(result);
        }
        release(memory.values_empty(before));
        round_weights(weights, scores);
    }
    release(memory.queries_empty());
    barrier_wait(memory.values_full(at.slot), at.parity);
    begin_result<S::HEAD, S::KEYS>(result, weights, moved(values, 2 * at.slot * S::KEY_BYTES));
    products_wait<0>();
    pin(result);
    release(memory.values_empty(at.slot));
    at.advance<S::STAGES>();

#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 token = me.row(half) / of.group, head = job.kv_head * of.group + me.row(half) % of.group;
        bool exists = token < job.tokens && job.tile.first + token < job.tile.queries;
        i64 place = i64(job.tile.query_start + job.tile.first + token) * (of.group * of.kv_heads) + head;
        f32 sum = lanes_sum<4>(softmax.sum[half]);
        if (exists && me.t == 0) of.lse[place] = softmax.largest[half] * of.scale + logf(sum);
        store_row(result, half, 1.0f / sum, of.out + place * of.dim, of.dim, me.t, exists);
    }
}

template <class S>
DEVICE void attention(const Operands& of) {
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
        for_each_job(of.tiles, of.tile_count, of.kv_heads, ROWS / of.group, [&](const Job& job) {
            barrier_wait(memory.queries_full(), turn);
            turn ^= 1;
            attend<S>(memory, of, me, job, at);
        });
    }
}

// Head size, keys of a tile, stages.
#define HOPPER_ATTENTION(head, keys, stages)                                                                                  \
    ENTRY(ATTENTION_THREADS, 1)                                                                                               \
    hopper_attention_forward_head##head##_bf16(MAP q, MAP k, MAP v, MAP v_row, const i32* __restrict__ tiles,                 \
                                       bf16* __restrict__ out, f32* __restrict__ lse, i32 tile_count, i32 group,              \
                                       i32 kv_heads, i32 dim, f32 scale) {                                                    \
        attention<Sizes<head, keys, stages>>({&q, &k, &v, &v_row, tiles, out, lse, tile_count, group, kv_heads, dim, scale}); \
    }
HOPPER_ATTENTION(64, 128, 4)
HOPPER_ATTENTION(80, 128, 3)
HOPPER_ATTENTION(96, 128, 3)
HOPPER_ATTENTION(128, 128, 3)
HOPPER_ATTENTION(256, 80, 2)
