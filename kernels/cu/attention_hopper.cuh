// What Hopper's kernels of attention share: tiles whose rows are (token, head) pairs, products of a warp group's 64 rows with rows that
// pass through shared memory, and results on their way out. attention_hopper.cu says how tiles lie in shared memory.

#pragma once
#include "attention.cuh"
#include "hopper.cuh"

constexpr f32 LOG2_E = 1.4426950408889634f;
constexpr i32 ATTENTION_THREADS = 384;  // three warp groups: one copies, two multiply
constexpr i32 MULTIPLYING_WARPS = 8;
// What a block is launched with. Who asks for more waits for ever.
constexpr i32 BLOCK_REGISTERS = 65536 / ATTENTION_THREADS / 8 * 8 * ATTENTION_THREADS;
// Rows of a tile that stays.
constexpr i32 ROWS = 128;
// A row of a tile in shared memory: 64 elements. A tile of longer rows is several such, one behind the other.
constexpr i32 SPAN = 64;
constexpr i32 SPAN_BYTES = 128;
template <i32 HEAD>
constexpr i32 SPANS = (HEAD + SPAN - 1) / SPAN;

// One tile of one key/value head.
struct Job {
    Tile tile;
    i32 kv_head, tokens;  // tokens of a tile

    // The last key that the tile's first query sees, and the keys that any of its queries sees.
    DEVICE i32 first_seen() const { return tile.first + tile.extra_keys(); }
    DEVICE i32 visible() const { return first_seen() + min(tokens, tile.queries - tile.first); }
};

// Gives `work` every tile of this block. The list begins with the longest tiles: blocks take them in rising order and in falling order
// by turns, so that who had the longest of one round has the shortest of the next.
template <class Work>
DEVICE void for_each_job(const i32* tiles, i32 tile_count, i32 kv_heads, i32 tokens, Work work) {
    i32 blocks = i32(gridDim.x), block = i32(blockIdx.x);
    i64 count = i64(tile_count) * kv_heads;
    for (i64 begin = 0, round = 0; begin < count; begin += blocks, round++) {
        i64 index = begin + (round % 2 == 0 ? block : blocks - 1 - block);
        if (index >= count) continue;
        Job job{load_tile(tiles, i32(index / kv_heads)), i32(index % kv_heads), tokens};
        if (job.tile.queries > 0) work(job);  // the list has room for more tiles than there are
    }
}

// ---- the copying warp ----------------------------------------------------------------------------------------------

// Begins to copy COUNT rows of one head from `first` on, of which `exist` are the document's: as boxes; or, where the document ends among
// them and `whole` is not asked for, row by row, and zeros instead of what is not the document's. All lanes call it; the barrier expects
// all bytes of the tile.
template <i32 HEAD, i32 COUNT>
DEVICE void copy_rows(u8* to, const TensorMap* map, const TensorMap* row_map, i32 head, i32 first, i32 exist, bool whole, u64* full) {
    if (whole || exist >= COUNT) {
        for (i32 span = 0; span < SPANS<HEAD> && lane_index() == 0; span++)
            copy_box(to + span * COUNT * SPAN_BYTES, map, span * SPAN, head, first, full);
        return;
    }
    for (i32 row = lane_index(); row < COUNT; row += WARP_LANES) {
        for (i32 span = 0; span < SPANS<HEAD>; span++)
            copy_box(to + (span * COUNT + row) * SPAN_BYTES, row_map, span * SPAN, head, row < exist ? first + row : -1, full);
    }
}

// ---- the multiplying groups ----------------------------------------------------------------------------------------

// Who a multiplying thread is: of two groups, of four warps; lane = 4 g + t. It has rows `row(0)` and `row(1)` of a tile.
struct Multiplier {
    i32 group, first_row, g, t;

    DEVICE Multiplier() {
        i32 warp = from_lane(warp_index(), 0) - WARP_GROUP / WARP_LANES;
        group = warp / 4, first_row = warp * 16, g = lane_index() / 4, t = lane_index() % 4;
    }
    DEVICE i32 row(i32 half) const { return first_row + g + 8 * half; }
    // This group's rows of a tile that stays.
    DEVICE u64 left(const u8* tile) const { return factor(tile + group * (ROWS / 2 * SPAN_BYTES), SWIZZLE_REPEAT); }
};

// Says that this warp has done with what a barrier is for.
DEVICE void release(u64* empty) {
    if (lane_index() == 0) barrier_arrive(empty);
}

// scores [64, COUNT] = left [64, HEAD] · right [COUNT, HEAD]ᵀ, begun.
template <i32 HEAD, i32 COUNT>
DEVICE void begin_scores(f32 (&scores)[COUNT / 2], u64 left, u64 right) {
    products_begin();
#pragma unroll
    for (i32 depth = 0; depth < HEAD; depth += 16) {
        i32 span = depth / SPAN * SPAN_BYTES, within = depth % SPAN * 2;
        multiply_async<false>(scores, moved(left, span * ROWS + within), moved(right, span * COUNT + within), depth > 0);
    }
    products_commit();
}

// result [64, HEAD] += weights [64, COUNT] · right [COUNT, HEAD], begun; `right` is a factor whose rows are the depth.
template <i32 HEAD, i32 COUNT>
DEVICE void begin_result(f32 (&result)[HEAD / 2], const u32 (&weights)[COUNT / 16][4], u64 right) {
    products_begin(weights);
#pragma unroll
    for (i32 depth = 0; depth < COUNT; depth += 16)
        multiply_async_transposed(result, weights[depth / 16], moved(right, depth * SPAN_BYTES));
    products_commit();
}

// Accumulators are the next product's left factor as they are, but for rounding.
template <i32 COUNT>
DEVICE void round_weights(u32 (&weights)[COUNT / 8][4], const f32 (&scores)[COUNT]) {
#pragma unroll
    for (i32 i = 0; i < COUNT / 2; i++) weights[i / 4][i % 4] = bf16_pair(scores[2 * i], scores[2 * i + 1]);
}

// ---- results -------------------------------------------------------------------------------------------------------

// Four words of each of four neighbouring lanes, turned over: word p of lane t becomes word t of lane p.
DEVICE void turn_over(u32 (&words)[4]) {
#pragma unroll
    for (i32 bit = 1; bit < 4; bit *= 2) {
        bool upper = lane_index() & bit;
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            if (i & bit) continue;
            u32 received = lane_across(upper ? words[i] : words[i + bit], bit);
            if (upper) {
                words[i] = received;
            } else {
                words[i + bit] = received;
            }
        }
    }
}

// Writes one of the thread's rows: its four lanes have two columns of each eight, and write eight of four columns' each.
template <i32 COUNT>
DEVICE void store_row(const f32 (&result)[COUNT], i32 half, f32 factor, bf16* to, i32 dim, i32 t, bool exists) {
    constexpr i32 EIGHTS = COUNT / 4;
#pragma unroll
    for (i32 first = 0; first < EIGHTS; first += 4) {
        u32 words[4];
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            i32 at = (first + i < EIGHTS ? first + i : 0) * 4 + 2 * half;
            words[i] = bf16_pair(result[at] * factor, result[at + 1] * factor);
        }
        turn_over(words);
        i32 column = (first + t) * PACK;
        if (exists && column < dim) *reinterpret_cast<uint4*>(to + column) = uint4{words[0], words[1], words[2], words[3]};
    }
}
