// Causal attention over packed documents on tensor cores: bf16 activations, head sizes up to 64, 80, 96, 128 and 256.
// The formulas are those of attention.cu.
//
// The method is FlashAttention-2 (Dao 2023, arXiv 2307.08691): scores of a tile of queries and a tile of keys live in registers,
// softmax runs on line, and the backward pass makes the probabilities anew from lse. Unlike there, dq has a kernel of its own
// instead of atomics, which costs 7 products where 5 would do and keeps the bits the same every time.
//
// Tensors: q, o, do, dq [Tq, H, D]; k, v, dk, dv [Tk, K, D] in bf16; lse, δ [T, H] f32; tiles i32 [n, 5] (attention.cuh).
//
// Work for each pair of query and visible key of a head: 2 D multiply-adds forward; 3 D for dq, 4 D for dk and dv (5 D at 256).
// Bytes: q, o (and do) once; k, v of the document once for each tile of queries, out of the second-level cache. Limited by
// tensor cores at any length beyond a few hundred.
//
// Decomposition:
//   forward, dq   a block has 16 queries a warp of one head; tiles of keys and values pass through shared memory, copied
//                 asynchronously, the next one (STAGES 2) while this one is used;
//   dk, dv        a block has 64 keys of one key/value head, 16 a warp; tiles of 32 queries of every query head of the group, in
//                 rising order, pass through. Scores are made transposed (keys are the rows), so that P^T and dS^T come out of
//                 the accumulators as the left factors of the next products, and no warp needs another's.
// A warp's accumulators are the next product's left factor without any exchange: columns 2t, 2t + 1 of a tile of scores are
// what mma wants of its A (common.cuh). The result of 16 rows takes HEAD / 2 registers of each lane: at HEAD 256, dk and dv
// do not fit together, and gridDim.y halves the work: dv by blocks y = 0, dk by blocks y = 1, which repeat the scores.
//
// A row of HEAD elements takes an odd number of 16-byte chunks in shared memory (one is padding), so eight consecutive rows lie
// in eight different groups of banks for load_matrices, at addresses that differ from tile to tile by constants only.
// Shared memory of a block is at most 99 KB, what sm_86 and sm_89 have.
//
//   head  forward: queries, keys, stages   dq: queries, keys, stages   dk, dv: keys, queries, stages
//     64      128, 64, 2                      64, 64, 2                   64, 32, 2
//     80      128, 64, 2                      64, 32, 2                   64, 32, 2
//     96      128, 32, 2                      64, 32, 2                   64, 32, 2
//    128      128, 32, 2                      64, 32, 2                   64, 32, 2
//    256       64, 32, 2                      64, 32, 1                   64, 32, 1
//
// Numerics: sums in f32; exponentials to base 2 with the scale folded in; P and dS are rounded to bf16 as factors, row sums are
// of the unrounded P. Head sizes between two instances are filled with zeros. Bits depend on the document alone.
//
// Limits: head sizes to 256; rows that are no multiple of 8 elements are copied element by element.

#include "attention.cuh"

constexpr f32 LOG2_E = 1.4426950408889634f;
constexpr f32 LN_2 = 0.6931471805599453f;
constexpr i32 ROWS = 16;           // of a warp
constexpr i32 BACKWARD_WARPS = 4;
constexpr i32 QUERY_TILE = 32;     // of dk, dv

// ---- rows in shared memory -------------------------------------------------------------------------------------------

// Elements from one row to the next.
template <i32 HEAD>
constexpr i32 PITCH = (HEAD / 8 | 1) * 8;

// Begins to copy COUNT rows; elements that do not exist become zero.
template <i32 HEAD, i32 COUNT, i32 THREADS>
DEVICE void load_rows(bf16* to, const HeadRows<const bf16>& rows) {
    constexpr i32 CHUNKS = HEAD / PACK;
    bool aligned = rows.dim % PACK == 0;
    for (i32 i = i32(threadIdx.x); i < COUNT * CHUNKS; i += THREADS) {
        i32 row = i / CHUNKS, first = i % CHUNKS * PACK;
        bf16* place = to + row * PITCH<HEAD> + first;
        bool exists = row < rows.count && first < rows.dim;
        if (aligned) {
            copy_async(place, exists ? rows.row(row) + first : rows.first, exists ? 16 : 0);
        } else {
            store_wide(place, load_pack(exists ? rows.row(row) : rows.first, first, exists ? rows.dim : 0, false));
        }
    }
}

// Address of this lane for a 16 × 16 block of a tile: fragments of a left factor, and of a right factor whose rows are the depth.
template <i32 HEAD>
DEVICE const bf16* deep_rows(const bf16* tile, i32 row, i32 column) {
    return tile + (row + lane_index() % 16) * PITCH<HEAD> + column + lane_index() / 16 * 8;
}

// The same, for a right factor whose columns are the depth.
template <i32 HEAD>
DEVICE const bf16* wide_rows(const bf16* tile, i32 row, i32 column) {
    return tile + (row + lane_index() / 16 * 8 + lane_index() % 8) * PITCH<HEAD> + column + lane_index() / 8 % 2 * 8;
}

// Two neighbouring tiles of 16 × 8: sums[0] += a · b[0..2], sums[1] += a · b[2..4].
DEVICE void multiply_add_pair(f32 (&first)[4], f32 (&second)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    multiply_add(first, a, left);
    multiply_add(second, a, right);
}

// sums [16, N] += left [16, HEAD] · right [N, HEAD]ᵀ, both in shared memory.
template <i32 HEAD, i32 N>
DEVICE void add_scores(f32 (&sums)[N / 8][4], const bf16* left, const bf16* right) {
#pragma unroll
    for (i32 depth = 0; depth < HEAD; depth += 16) {
        u32 a[4];
        load_matrices(a, deep_rows<HEAD>(left, 0, depth));
#pragma unroll
        for (i32 column = 0; column < N; column += 16) {
            u32 b[4];
            load_matrices(b, wide_rows<HEAD>(right, column, depth));
            multiply_add_pair(sums[column / 8], sums[column / 8 + 1], a, b);
        }
    }
}

// sums [16, HEAD] += weights [16, N] · right [N, HEAD]: the weights are accumulators, rounded to bf16.
template <i32 HEAD, i32 N>
DEVICE void add_weighted(f32 (&sums)[HEAD / 8][4], const f32 (&weights)[N / 8][4], const bf16* right) {
#pragma unroll
    for (i32 depth = 0; depth < N; depth += 16) {
        const f32(&low)[4] = weights[depth / 8];
        const f32(&high)[4] = weights[depth / 8 + 1];
        u32 a[4] = {bf16_pair(low[0], low[1]), bf16_pair(low[2], low[3]), bf16_pair(high[0], high[1]),
                    bf16_pair(high[2], high[3])};
#pragma unroll
        for (i32 column = 0; column < HEAD; column += 16) {
            u32 b[4];
            load_matrices_transposed(b, deep_rows<HEAD>(right, depth, column));
            multiply_add_pair(sums[column / 8], sums[column / 8 + 1], a, b);
        }
    }
}

template <i32 N>
DEVICE void clear(f32 (&sums)[N][4]) {
#pragma unroll
    for (i32 i = 0; i < N; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
}

// Where this lane's accumulators lie: element e of tile i is row `lane_row(e)`, column `8 i + lane_column(e)`.
DEVICE i32 lane_row(i32 element) { return lane_index() / 4 + element / 2 * 8; }
DEVICE i32 lane_column(i32 element) { return lane_index() % 4 * 2 + element % 2; }

// Writes 16 rows; row r is multiplied by factors[r / 8 of the lane's two].
template <i32 HEAD>
DEVICE void store_rows(const f32 (&sums)[HEAD / 8][4], const HeadRows<bf16>& rows, f32 first_factor, f32 second_factor) {
    bool paired = rows.dim % 2 == 0;
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 row = lane_row(2 * half);
        if (row >= rows.count) continue;
        bf16* to = rows.row(row);
        f32 factor = half ? second_factor : first_factor;
#pragma unroll
        for (i32 i = 0; i < HEAD / 8; i++) {
            i32 column = 8 * i + lane_column(0);
            f32 low = sums[i][2 * half] * factor, high = sums[i][2 * half + 1] * factor;
            if (paired && column < rows.dim) {
                *reinterpret_cast<u32*>(to + column) = bf16_pair(low, high);
            } else {
                if (column < rows.dim) to[column] = from_f32<bf16>(low);
                if (column + 1 < rows.dim) to[column + 1] = from_f32<bf16>(high);
            }
        }
    }
}

// ---- tiles that pass through shared memory ---------------------------------------------------------------------------

// Runs `use(stage, index)` for 0..count, when what `load(stage, index)` began to copy is there, with STAGES 2 while the next is
// on its way. Copies that were begun before are waited for too.
template <i32 STAGES, class Load, class Use>
DEVICE void pipeline(i32 count, Load load, Use use) {
    if (count > 0) load(0, 0);
    copies_commit();
    for (i32 index = 0; index < count; index++) {
        if constexpr (STAGES == 2) {
            if (index + 1 < count) load((index + 1) % 2, index + 1);
            copies_commit();
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }
        __syncthreads();
        use(index % STAGES, index);
        __syncthreads();  // everybody is done with the stage
        if constexpr (STAGES == 1) {
            if (index + 1 < count) load(0, index + 1);
            copies_commit();
        }
    }
    copies_wait<0>();
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Softmax as far as it has come, of the lane's two rows; scores are in units of log₂.
struct Softmax {
    f32 largest[2], sum[2];  // the sums are of this lane's columns
};

// Turns scores into weights relative to the new maximum; what was summed before is to be multiplied by `correction`.
template <i32 N>
DEVICE void advance(Softmax& softmax, f32 (&scores)[N / 8][4], f32 (&correction)[2]) {
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        f32 highest = softmax.largest[half];
#pragma unroll
        for (i32 i = 0; i < N / 8; i++) highest = max(highest, max(scores[i][2 * half], scores[i][2 * half + 1]));
        highest = lanes_max<4>(highest);
        correction[half] = power_of_two(softmax.largest[half] - highest);
        f32 sum = 0.0f;
#pragma unroll
        for (i32 i = 0; i < N / 8; i++) {
#pragma unroll
            for (i32 e = 2 * half; e < 2 * half + 2; e++) {
                scores[i][e] = power_of_two(scores[i][e] - highest);
                sum += scores[i][e];
            }
        }
        softmax.sum[half] = softmax.sum[half] * correction[half] + sum;
        softmax.largest[half] = highest;
    }
}

template <i32 HEAD, i32 WARPS, i32 KEYS, i32 STAGES>
DEVICE void attention_forward(const bf16* q, const bf16* k, const bf16* v, const i32* tiles, bf16* out, f32* lse, i32 heads,
                              i32 kv_heads, i32 dim, f32 scale) {
    constexpr i32 THREADS = WARPS * WARP_LANES, QUERIES = WARPS * ROWS, STAGE = 2 * KEYS * PITCH<HEAD>;
    DYNAMIC_SHARED(memory);
    bf16* query_tile = reinterpret_cast<bf16*>(memory);
    bf16* stages = query_tile + QUERIES * PITCH<HEAD>;
    i32 head;
    Tile tile = find_tile(tiles, heads, head);
    i32 kv_head = head / (heads / kv_heads);
    auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    load_rows<HEAD, QUERIES, THREADS>(query_tile, queries);

    i32 own_row = warp_index() * ROWS;
    i32 first_seen = tile.first + tile.extra_keys();  // the last key that the tile's first query sees
    i32 visible = first_seen + min(QUERIES, queries.count);
    Softmax softmax = {{-__uint_as_float(F32_INFINITY_BITS), -__uint_as_float(F32_INFINITY_BITS)}, {0.0f, 0.0f}};
    f32 result[HEAD / 8][4];
    clear(result);
    auto load = [&](i32 stage, i32 index) {
        load_rows<HEAD, KEYS, THREADS>(stages + stage * STAGE, keys.from(index * KEYS));
        load_rows<HEAD, KEYS, THREADS>(stages + stage * STAGE + STAGE / 2, values.from(index * KEYS));
    };
    auto use = [&](i32 stage, i32 index) {
        f32 scores[KEYS / 8][4];
        clear(scores);
        add_scores<HEAD, KEYS>(scores, query_tile + own_row * PITCH<HEAD>, stages + stage * STAGE);
        bool masked = (index + 1) * KEYS - 1 > first_seen;
#pragma unroll
        for (i32 i = 0; i < KEYS / 8; i++) {
#pragma unroll
            for (i32 e = 0; e < 4; e++) {
                i32 key = index * KEYS + 8 * i + lane_column(e);
                bool seen = !masked || key <= first_seen + own_row + lane_row(e);
                scores[i][e] = seen ? scores[i][e] * (scale * LOG2_E) : -__uint_as_float(F32_INFINITY_BITS);
            }
        }
        f32 correction[2];
        advance<KEYS>(softmax, scores, correction);
#pragma unroll
        for (i32 i = 0; i < HEAD / 8; i++) {
            result[i][0] *= correction[0], result[i][1] *= correction[0];
            result[i][2] *= correction[1], result[i][3] *= correction[1];
        }
        add_weighted<HEAD, KEYS>(result, scores, stages + stage * STAGE + STAGE / 2);
    };
    pipeline<STAGES>((visible + KEYS - 1) / KEYS, load, use);

    f32 sum[2] = {lanes_sum<4>(softmax.sum[0]), lanes_sum<4>(softmax.sum[1])};
    auto rows = head_rows(out, heads, dim, head, tile.query_start, tile.queries).from(tile.first + own_row);
    store_rows<HEAD>(result, rows, 1.0f / sum[0], 1.0f / sum[1]);
    if (lane_index() % 4 == 0) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i64 row = tile.query_start + tile.first + own_row + lane_row(2 * half);
            if (lane_row(2 * half) < rows.count) lse[row * heads + head] = softmax.largest[half] * LN_2 + logf(sum[half]);
        }
    }
}

// ---- backward --------------------------------------------------------------------------------------------------------

template <i32 HEAD, i32 KEYS, i32 STAGES>
DEVICE void attention_backward_queries(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const f32* lse,
                                       const f32* delta, const i32* tiles, bf16* dq, i32 heads, i32 kv_heads, i32 dim,
                                       f32 scale) {
    constexpr i32 THREADS = BACKWARD_WARPS * WARP_LANES, QUERIES = BACKWARD_WARPS * ROWS, STAGE = 2 * KEYS * PITCH<HEAD>;
    DYNAMIC_SHARED(memory);
    bf16* query_tile = reinterpret_cast<bf16*>(memory);
    bf16* gradient_tile = query_tile + QUERIES * PITCH<HEAD>;
    bf16* stages = gradient_tile + QUERIES * PITCH<HEAD>;
    i32 head;
    Tile tile = find_tile(tiles, heads, head);
    i32 kv_head = head / (heads / kv_heads);
    auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto gradients = head_rows(dout, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    load_rows<HEAD, QUERIES, THREADS>(query_tile, queries);
    load_rows<HEAD, QUERIES, THREADS>(gradient_tile, gradients);

    i32 own_row = warp_index() * ROWS;
    f32 row_lse[2], row_delta[2];
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 row = own_row + lane_row(2 * half);
        i64 at = i64(tile.query_start + tile.first + row) * heads + head;
        row_lse[half] = row < queries.count ? lse[at] * LOG2_E : 0.0f;
        row_delta[half] = row < queries.count ? delta[at] : 0.0f;
    }
    f32 result[HEAD / 8][4];
    clear(result);
    auto load = [&](i32 stage, i32 index) {
        load_rows<HEAD, KEYS, THREADS>(stages + stage * STAGE, keys.from(index * KEYS));
        load_rows<HEAD, KEYS, THREADS>(stages + stage * STAGE + STAGE / 2, values.from(index * KEYS));
    };
    auto use = [&](i32 stage, i32 index) {
        f32 scores[KEYS / 8][4], slopes[KEYS / 8][4];
        clear(scores);
        clear(slopes);
        add_scores<HEAD, KEYS>(scores, query_tile + own_row * PITCH<HEAD>, stages + stage * STAGE);
        add_scores<HEAD, KEYS>(slopes, gradient_tile + own_row * PITCH<HEAD>, stages + stage * STAGE + STAGE / 2);
        bool masked = (index + 1) * KEYS - 1 > tile.first;
#pragma unroll
        for (i32 i = 0; i < KEYS / 8; i++) {
#pragma unroll
            for (i32 e = 0; e < 4; e++) {
                i32 key = index * KEYS + 8 * i + lane_column(e);
                bool seen = !masked || key <= tile.first + own_row + lane_row(e);
                f32 p = power_of_two(scores[i][e] * (scale * LOG2_E) - row_lse[e / 2]);
                scores[i][e] = seen ? p * (slopes[i][e] - row_delta[e / 2]) : 0.0f;
            }
        }
        add_weighted<HEAD, KEYS>(result, scores, stages + stage * STAGE);
    };
    i32 visible = tile.first + min(QUERIES, queries.count);
    pipeline<STAGES>((visible + KEYS - 1) / KEYS, load, use);
    auto rows = head_rows(dq, heads, dim, head, tile.query_start, tile.queries).from(tile.first + own_row);
    store_rows<HEAD>(result, rows, scale, scale);
}

// What a block of `attention_backward_keys` makes.
enum Part { BOTH, VALUES_ONLY, KEYS_ONLY };

template <i32 HEAD, i32 STAGES, Part PART>
DEVICE void attention_backward_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const f32* lse,
                                    const f32* delta, const i32* tiles, bf16* dk, bf16* dv, i32 heads, i32 kv_heads, i32 dim,
                                    f32 scale) {
    constexpr i32 THREADS = BACKWARD_WARPS * WARP_LANES, KEYS = BACKWARD_WARPS * ROWS, N = QUERY_TILE;
    constexpr i32 STAGE = 2 * N * PITCH<HEAD>;
    constexpr bool MAKES_KEYS = PART != VALUES_ONLY, MAKES_VALUES = PART != KEYS_ONLY;
    static_assert(N == WARP_LANES, "a lane holds lse and delta of one query of a tile");
    DYNAMIC_SHARED(memory);
    bf16* key_tile = reinterpret_cast<bf16*>(memory);
    bf16* value_tile = key_tile + KEYS * PITCH<HEAD>;
    bf16* stages = value_tile + KEYS * PITCH<HEAD>;
    i32 kv_head;
    Tile tile = find_tile(tiles, kv_heads, kv_head);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first);
    load_rows<HEAD, KEYS, THREADS>(key_tile, keys);
    if constexpr (MAKES_KEYS) load_rows<HEAD, KEYS, THREADS>(value_tile, values);

    // The queries that see a key of this tile, of all heads of the group, tile by tile.
    i32 query_tiles = (tile.queries - tile.first + N - 1) / N, group = heads / kv_heads;
    i32 own_row = warp_index() * ROWS;
    f32 key_result[MAKES_KEYS ? HEAD / 8 : 1][4], value_result[MAKES_VALUES ? HEAD / 8 : 1][4];
    clear(key_result);
    clear(value_result);
    auto load = [&](i32 stage, i32 index) {
        i32 head = kv_head * group + index / query_tiles, query = tile.first + index % query_tiles * N;
        auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(query);
        auto gradients = head_rows(dout, heads, dim, head, tile.query_start, tile.queries).from(query);
        load_rows<HEAD, N, THREADS>(stages + stage * STAGE, queries);
        load_rows<HEAD, N, THREADS>(stages + stage * STAGE + STAGE / 2, gradients);
    };
    auto use = [&](i32 stage, i32 index) {
        i32 head = kv_head * group + index / query_tiles, query = tile.first + index % query_tiles * N;
        const bf16* query_tile = stages + stage * STAGE;
        const bf16* gradient_tile = query_tile + STAGE / 2;
        bool exists = query + lane_index() < tile.queries;
        i64 at = i64(tile.query_start + query + lane_index()) * heads + head;
        f32 lane_lse = exists ? lse[at] * LOG2_E : 0.0f, lane_delta = MAKES_KEYS && exists ? delta[at] : 0.0f;
        f32 scores[N / 8][4];
        clear(scores);
        add_scores<HEAD, N>(scores, key_tile + own_row * PITCH<HEAD>, query_tile);
        bool masked = tile.first + KEYS - 1 > query;
#pragma unroll
        for (i32 i = 0; i < N / 8; i++) {
#pragma unroll
            for (i32 e = 0; e < 4; e++) {
                i32 column = 8 * i + lane_column(e);
                f32 query_lse = from_lane(lane_lse, column);
                bool seen = !masked || tile.first + own_row + lane_row(e) <= query + column;
                scores[i][e] = seen ? power_of_two(scores[i][e] * (scale * LOG2_E) - query_lse) : 0.0f;
            }
        }
        if constexpr (MAKES_VALUES) add_weighted<HEAD, N>(value_result, scores, gradient_tile);
        if constexpr (MAKES_KEYS) {
            f32 slopes[N / 8][4];
            clear(slopes);
            add_scores<HEAD, N>(slopes, value_tile + own_row * PITCH<HEAD>, gradient_tile);
#pragma unroll
            for (i32 i = 0; i < N / 8; i++) {
#pragma unroll
                for (i32 e = 0; e < 4; e++)
                    scores[i][e] *= slopes[i][e] - from_lane(lane_delta, 8 * i + lane_column(e));
            }
            add_weighted<HEAD, N>(key_result, scores, query_tile);
        }
    };
    pipeline<STAGES>(query_tiles * group, load, use);
    if constexpr (MAKES_KEYS) {
        auto rows = head_rows(dk, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first + own_row);
        store_rows<HEAD>(key_result, rows, scale, scale);
    }
    if constexpr (MAKES_VALUES) {
        auto rows = head_rows(dv, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first + own_row);
        store_rows<HEAD>(value_result, rows, 1.0f, 1.0f);
    }
}

// dk and dv in one block where registers hold both, otherwise one of them.
template <i32 HEAD, i32 STAGES>
DEVICE void attention_backward_parts(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const f32* lse,
                                     const f32* delta, const i32* tiles, bf16* dk, bf16* dv, i32 heads, i32 kv_heads, i32 dim,
                                     f32 scale) {
    if constexpr (HEAD <= 128) {
        attention_backward_keys<HEAD, STAGES, BOTH>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim, scale);
    } else if (blockIdx.y == 0) {
        attention_backward_keys<HEAD, STAGES, VALUES_ONLY>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim,
                                                           scale);
    } else {
        attention_backward_keys<HEAD, STAGES, KEYS_ONLY>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim, scale);
    }
}

// head size; threads, keys and stages forward; keys and stages of dq; stages of dk and dv
#define ATTENTION(head, threads, keys, stages, dq_keys, dq_stages, dk_stages)                                               \
    ENTRY(threads)                                                                                                          \
    attention_forward_head##head##_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k,                             \
                                        const bf16* __restrict__ v, const i32* __restrict__ tiles, bf16* __restrict__ out,  \
                                        f32* __restrict__ lse, i32 heads, i32 kv_heads, i32 dim, f32 scale) {               \
        attention_forward<head, threads / 32, keys, stages>(q, k, v, tiles, out, lse, heads, kv_heads, dim, scale);         \
    }                                                                                                                       \
    ENTRY(128)                                                                                                              \
    attention_backward_queries_head##head##_bf16(                                                                           \
        const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,  \
        const f32* __restrict__ lse, const f32* __restrict__ delta, const i32* __restrict__ tiles, bf16* __restrict__ dq,   \
        i32 heads, i32 kv_heads, i32 dim, f32 scale) {                                                                      \
        attention_backward_queries<head, dq_keys, dq_stages>(q, k, v, dout, lse, delta, tiles, dq, heads, kv_heads, dim,    \
                                                             scale);                                                        \
    }                                                                                                                       \
    ENTRY(128)                                                                                                              \
    attention_backward_keys_head##head##_bf16(                                                                              \
        const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,  \
        const f32* __restrict__ lse, const f32* __restrict__ delta, const i32* __restrict__ tiles, bf16* __restrict__ dk,   \
        bf16* __restrict__ dv, i32 heads, i32 kv_heads, i32 dim, f32 scale) {                                               \
        attention_backward_parts<head, dk_stages>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim, scale);   \
    }
ATTENTION(64, 256, 64, 2, 64, 2, 2)
ATTENTION(80, 256, 64, 2, 32, 2, 2)
ATTENTION(96, 256, 32, 2, 32, 2, 2)
ATTENTION(128, 256, 32, 2, 32, 2, 2)
ATTENTION(256, 128, 32, 2, 32, 1, 1)
