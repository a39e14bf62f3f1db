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
//   forward, dq   a block of four warps has 16 or 32 queries a warp of one head; tiles of keys and values pass through shared
//                 memory, copied asynchronously, the next one (STAGES 2) while this one is used. With 32 queries a fragment of
//                 keys or values is loaded once for two products, as far as registers go;
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
constexpr i32 THREADS = 128;
constexpr i32 WARPS = THREADS / WARP_LANES;
constexpr i32 QUERY_TILE = 32;  // of dk, dv

// ---- rows in shared memory -------------------------------------------------------------------------------------------

// Elements from one row to the next.
template <i32 HEAD>
constexpr i32 PITCH = (HEAD / 8 | 1) * 8;

// The same for rows that do not begin at 16-byte boundaries, element by element and at once.
template <i32 HEAD, i32 COUNT>
__noinline__ __device__ void load_ragged_rows(bf16* to, HeadRows<const bf16> rows) {
    constexpr i32 CHUNKS = HEAD / PACK;
    for (i32 i = i32(threadIdx.x); i < COUNT * CHUNKS; i += THREADS) {
        i32 row = i / CHUNKS, first = i % CHUNKS * PACK;
        i32 dim = row < rows.count ? rows.dim : 0;
        store_wide(to + row * PITCH<HEAD> + first, load_pack(dim > 0 ? rows.row(row) : rows.first, first, dim, false));
    }
}

// Begins to copy COUNT rows; elements that do not exist become zero. A thread copies the same chunk of rows STEP apart, where
// chunks of a row divide the threads.
template <i32 HEAD, i32 COUNT>
DEVICE void load_rows(bf16* to, const HeadRows<const bf16>& rows) {
    constexpr i32 CHUNKS = HEAD / PACK, STEP = THREADS / CHUNKS;
    if (rows.dim % PACK != 0) return load_ragged_rows<HEAD, COUNT>(to, rows);
    if constexpr (THREADS % CHUNKS == 0 && COUNT % STEP == 0) {
        i32 row = i32(threadIdx.x) / CHUNKS, first = i32(threadIdx.x) % CHUNKS * PACK;
        i32 count = first < rows.dim ? rows.count - row : 0;
        const bf16* from = rows.row(row) + first;
        bf16* place = to + row * PITCH<HEAD> + first;
        i64 step = STEP * rows.stride;
#pragma unroll
        for (i32 i = 0; i < COUNT / STEP; i++) {
            bool exists = i * STEP < count;
            copy_async(place + i * STEP * PITCH<HEAD>, exists ? from : rows.first, exists ? 16 : 0);
            from += step;
        }
    } else {
#pragma unroll
        for (i32 i = i32(threadIdx.x); i < COUNT * CHUNKS; i += THREADS) {
            i32 row = i / CHUNKS, first = i % CHUNKS * PACK;
            bool exists = row < rows.count && first < rows.dim;
            copy_async(to + row * PITCH<HEAD> + first, exists ? rows.row(row) + first : rows.first, exists ? 16 : 0);
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

// sums [16 M, N] += left [16 M, HEAD] · right [N, HEAD]ᵀ, both in shared memory. At HEAD 256, where results take half of all
// registers, the depth stays a loop: unrolled as a whole, fragments loaded far ahead push something else to local memory.
template <i32 HEAD, i32 N, i32 M>
DEVICE void add_scores(f32 (&sums)[M][N / 8][4], const bf16* left, const bf16* right) {
#pragma unroll(HEAD > 128 ? 4 : HEAD / 16)
    for (i32 depth = 0; depth < HEAD; depth += 16) {
        u32 a[M][4];
#pragma unroll
        for (i32 m = 0; m < M; m++) load_matrices(a[m], deep_rows<HEAD>(left, 16 * m, depth));
#pragma unroll
        for (i32 column = 0; column < N; column += 16) {
            u32 b[4];
            load_matrices(b, wide_rows<HEAD>(right, column, depth));
#pragma unroll
            for (i32 m = 0; m < M; m++) multiply_add_pair(sums[m][column / 8], sums[m][column / 8 + 1], a[m], b);
        }
    }
}

// sums [16 M, HEAD] += weights [16 M, N] · right [N, HEAD]: the weights are accumulators, rounded to bf16.
template <i32 HEAD, i32 N, i32 M>
DEVICE void add_weighted(f32 (&sums)[M][HEAD / 8][4], const f32 (&weights)[M][N / 8][4], const bf16* right) {
#pragma unroll
    for (i32 depth = 0; depth < N; depth += 16) {
        u32 a[M][4];
#pragma unroll
        for (i32 m = 0; m < M; m++) {
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                const f32(&weight)[4] = weights[m][depth / 8 + i / 2];
                a[m][i] = bf16_pair(weight[i % 2 * 2], weight[i % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (i32 column = 0; column < HEAD; column += 16) {
            u32 b[4];
            load_matrices_transposed(b, deep_rows<HEAD>(right, depth, column));
#pragma unroll
            for (i32 m = 0; m < M; m++) multiply_add_pair(sums[m][column / 8], sums[m][column / 8 + 1], a[m], b);
        }
    }
}

// Where this lane's accumulators lie: element e of tile i of block m is row 16 m + `lane_row(e)`, column 8 i + `lane_column(e)`.
DEVICE i32 lane_row(i32 element) { return lane_index() / 4 + element / 2 * 8; }
DEVICE i32 lane_column(i32 element) { return lane_index() % 4 * 2 + element % 2; }

// Writes 16 M rows; the lane's two rows of each block are multiplied by their factors.
template <i32 HEAD, i32 M>
DEVICE void store_rows(const f32 (&sums)[M][HEAD / 8][4], const HeadRows<bf16>& rows, const f32 (&factors)[M][2]) {
    bool paired = rows.dim % 2 == 0;
#pragma unroll
    for (i32 m = 0; m < M; m++) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = 16 * m + lane_row(2 * half);
            if (row >= rows.count) continue;
            bf16* to = rows.row(row);
#pragma unroll
            for (i32 i = 0; i < HEAD / 8; i++) {
                i32 column = 8 * i + lane_column(0);
                f32 low = sums[m][i][2 * half] * factors[m][half], high = sums[m][i][2 * half + 1] * factors[m][half];
                if (paired && column < rows.dim) {
                    *reinterpret_cast<u32*>(to + column) = bf16_pair(low, high);
                } else {
                    if (column < rows.dim) to[column] = from_f32<bf16>(low);
                    if (column + 1 < rows.dim) to[column + 1] = from_f32<bf16>(high);
                }
            }
        }
    }
}

// Writes 16 M rows, all multiplied by one factor.
template <i32 HEAD, i32 M>
DEVICE void store_rows(const f32 (&sums)[M][HEAD / 8][4], const HeadRows<bf16>& rows, f32 factor) {
    f32 factors[M][2];
#pragma unroll
    for (i32 m = 0; m < M; m++) factors[m][0] = factors[m][1] = factor;
    store_rows<HEAD, M>(sums, rows, factors);
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

// Softmax as far as it has come, of the lane's two rows of a block; scores are in units of log₂.
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

template <i32 HEAD, i32 M, i32 KEYS, i32 STAGES>
DEVICE void attention_forward(const bf16* q, const bf16* k, const bf16* v, const i32* tiles, bf16* out, f32* lse, i32 heads,
                              i32 kv_heads, i32 dim, f32 scale) {
    constexpr i32 QUERIES = WARPS * 16 * M, STAGE = 2 * KEYS * PITCH<HEAD>;
    DYNAMIC_SHARED(memory);
    bf16* query_tile = reinterpret_cast<bf16*>(memory);
    bf16* stages = query_tile + QUERIES * PITCH<HEAD>;
    i32 head;
    Tile tile = find_tile(tiles, heads, head);
    i32 kv_head = head / (heads / kv_heads);
    auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    load_rows<HEAD, QUERIES>(query_tile, queries);

    i32 own_row = warp_index() * 16 * M;
    i32 first_seen = tile.first + tile.extra_keys();  // the last key that the tile's first query sees
    i32 visible = first_seen + min(QUERIES, queries.count);
    f32 scale_log2 = scale * LOG2_E;
    Softmax softmax[M];
    f32 result[M][HEAD / 8][4] = {};
#pragma unroll
    for (i32 m = 0; m < M; m++) softmax[m] = {{-infinity(), -infinity()}, {0.0f, 0.0f}};
    auto load = [&](i32 stage, i32 index) {
        load_rows<HEAD, KEYS>(stages + stage * STAGE, keys.from(index * KEYS));
        load_rows<HEAD, KEYS>(stages + stage * STAGE + STAGE / 2, values.from(index * KEYS));
    };
    auto use = [&](i32 stage, i32 index) {
        f32 scores[M][KEYS / 8][4] = {};
        add_scores<HEAD, KEYS, M>(scores, query_tile + own_row * PITCH<HEAD>, stages + stage * STAGE);
        bool masked = (index + 1) * KEYS - 1 > first_seen;
#pragma unroll
        for (i32 m = 0; m < M; m++) {
#pragma unroll
            for (i32 i = 0; i < KEYS / 8; i++) {
#pragma unroll
                for (i32 e = 0; e < 4; e++) scores[m][i][e] *= scale_log2;
            }
            // Every row sees key 0, so no maximum is −∞ after the first tile.
            if (masked) {
                i32 last = first_seen + own_row + 16 * m - index * KEYS;
#pragma unroll
                for (i32 i = 0; i < KEYS / 8; i++) {
#pragma unroll
                    for (i32 e = 0; e < 4; e++)
                        if (8 * i + lane_column(e) > last + lane_row(e)) scores[m][i][e] = -infinity();
                }
            }
            f32 correction[2];
            advance<KEYS>(softmax[m], scores[m], correction);
            // Maxima settle early in a row, and a factor of 1 changes nothing.
            if (lanes_saying(correction[0] != 1.0f || correction[1] != 1.0f) == 0) continue;
#pragma unroll
            for (i32 i = 0; i < HEAD / 8; i++) {
#pragma unroll
                for (i32 e = 0; e < 4; e++) result[m][i][e] *= correction[e / 2];
            }
        }
        add_weighted<HEAD, KEYS, M>(result, scores, stages + stage * STAGE + STAGE / 2);
    };
    pipeline<STAGES>((visible + KEYS - 1) / KEYS, load, use);

    auto rows = head_rows(out, heads, dim, head, tile.query_start, tile.queries).from(tile.first + own_row);
    f32 factors[M][2];
#pragma unroll
    for (i32 m = 0; m < M; m++) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = 16 * m + lane_row(2 * half);
            f32 sum = lanes_sum<4>(softmax[m].sum[half]);
            factors[m][half] = 1.0f / sum;
            if (lane_index() % 4 == 0 && row < rows.count) {
                i64 at = i64(tile.query_start + tile.first + own_row + row) * heads + head;
                lse[at] = softmax[m].largest[half] * LN_2 + logf(sum);
            }
        }
    }
    store_rows<HEAD, M>(result, rows, factors);
}

// ---- backward --------------------------------------------------------------------------------------------------------

template <i32 HEAD, i32 M, i32 KEYS, i32 STAGES>
DEVICE void attention_backward_queries(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const f32* lse,
                                       const f32* delta, const i32* tiles, bf16* dq, i32 heads, i32 kv_heads, i32 dim,
                                       f32 scale) {
    constexpr i32 QUERIES = WARPS * 16 * M, STAGE = 2 * KEYS * PITCH<HEAD>;
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
    load_rows<HEAD, QUERIES>(query_tile, queries);
    load_rows<HEAD, QUERIES>(gradient_tile, gradients);

    i32 own_row = warp_index() * 16 * M;
    f32 scale_log2 = scale * LOG2_E;
    f32 row_lse[M][2], row_delta[M][2];
#pragma unroll
    for (i32 m = 0; m < M; m++) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = own_row + 16 * m + lane_row(2 * half);
            i64 at = i64(tile.query_start + tile.first + row) * heads + head;
            row_lse[m][half] = row < queries.count ? lse[at] * LOG2_E : 0.0f;
            row_delta[m][half] = row < queries.count ? delta[at] : 0.0f;
        }
    }
    f32 result[M][HEAD / 8][4] = {};
    auto load = [&](i32 stage, i32 index) {
        load_rows<HEAD, KEYS>(stages + stage * STAGE, keys.from(index * KEYS));
        load_rows<HEAD, KEYS>(stages + stage * STAGE + STAGE / 2, values.from(index * KEYS));
    };
    auto use = [&](i32 stage, i32 index) {
        f32 scores[M][KEYS / 8][4] = {}, slopes[M][KEYS / 8][4] = {};
        add_scores<HEAD, KEYS, M>(scores, query_tile + own_row * PITCH<HEAD>, stages + stage * STAGE);
        add_scores<HEAD, KEYS, M>(slopes, gradient_tile + own_row * PITCH<HEAD>, stages + stage * STAGE + STAGE / 2);
        bool masked = (index + 1) * KEYS - 1 > tile.first;
#pragma unroll
        for (i32 m = 0; m < M; m++) {
            i32 last = tile.first + own_row + 16 * m - index * KEYS;
#pragma unroll
            for (i32 i = 0; i < KEYS / 8; i++) {
#pragma unroll
                for (i32 e = 0; e < 4; e++) {
                    f32 p = power_of_two(scores[m][i][e] * scale_log2 - row_lse[m][e / 2]);
                    bool seen = !masked || 8 * i + lane_column(e) <= last + lane_row(e);
                    scores[m][i][e] = seen ? p * (slopes[m][i][e] - row_delta[m][e / 2]) : 0.0f;
                }
            }
        }
        add_weighted<HEAD, KEYS, M>(result, scores, stages + stage * STAGE);
    };
    i32 visible = tile.first + min(QUERIES, queries.count);
    pipeline<STAGES>((visible + KEYS - 1) / KEYS, load, use);
    auto rows = head_rows(dq, heads, dim, head, tile.query_start, tile.queries).from(tile.first + own_row);
    store_rows<HEAD, M>(result, rows, scale);
}

// Which tile of queries comes next: rows of a head, then the next head's.
struct Walk {
    i32 head, row;

    DEVICE void next(i32 rows, i32 first, i32 end) {
        row += rows;
        if (row >= end) row = first, head++;
    }
};

// What a block of `attention_backward_keys` makes.
enum Part { BOTH, VALUES_ONLY, KEYS_ONLY };

template <i32 HEAD, i32 M, i32 STAGES, Part PART>
DEVICE void attention_backward_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const f32* lse,
                                    const f32* delta, const i32* tiles, bf16* dk, bf16* dv, i32 heads, i32 kv_heads, i32 dim,
                                    f32 scale) {
    constexpr i32 KEYS = WARPS * 16 * M, N = QUERY_TILE, STAGE = 2 * N * PITCH<HEAD>;
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
    load_rows<HEAD, KEYS>(key_tile, keys);
    if constexpr (MAKES_KEYS) load_rows<HEAD, KEYS>(value_tile, values);

    // The queries that see a key of this tile, of all heads of the group, tile by tile.
    i32 query_tiles = (tile.queries - tile.first + N - 1) / N, group = heads / kv_heads;
    i32 own_row = warp_index() * 16 * M;
    f32 scale_log2 = scale * LOG2_E;
    f32 key_result[M][MAKES_KEYS ? HEAD / 8 : 1][4] = {}, value_result[M][MAKES_VALUES ? HEAD / 8 : 1][4] = {};
    Walk loading{kv_head * group, tile.first}, working{kv_head * group, tile.first};
    auto load = [&](i32 stage, i32) {
        i32 head = loading.head, query = loading.row;
        loading.next(N, tile.first, tile.queries);
        auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(query);
        auto gradients = head_rows(dout, heads, dim, head, tile.query_start, tile.queries).from(query);
        load_rows<HEAD, N>(stages + stage * STAGE, queries);
        load_rows<HEAD, N>(stages + stage * STAGE + STAGE / 2, gradients);
    };
    auto use = [&](i32 stage, i32) {
        i32 head = working.head, query = working.row;
        working.next(N, tile.first, tile.queries);
        const bf16* query_tile = stages + stage * STAGE;
        const bf16* gradient_tile = query_tile + STAGE / 2;
        bool exists = query + lane_index() < tile.queries;
        i64 at = i64(tile.query_start + query + lane_index()) * heads + head;
        f32 lane_lse = exists ? lse[at] * LOG2_E : 0.0f, lane_delta = MAKES_KEYS && exists ? delta[at] : 0.0f;
        f32 scores[M][N / 8][4] = {};
        add_scores<HEAD, N, M>(scores, key_tile + own_row * PITCH<HEAD>, query_tile);
        bool masked = tile.first + KEYS - 1 > query;
        i32 last = query - tile.first - own_row;  // the last of the warp's keys that the first query sees
#pragma unroll
        for (i32 i = 0; i < N / 8; i++) {
            f32 of_columns[2] = {from_lane(lane_lse, 8 * i + lane_column(0)), from_lane(lane_lse, 8 * i + lane_column(1))};
#pragma unroll
            for (i32 m = 0; m < M; m++) {
#pragma unroll
                for (i32 e = 0; e < 4; e++) {
                    f32 p = power_of_two(scores[m][i][e] * scale_log2 - of_columns[e % 2]);
                    bool seen = !masked || 16 * m + lane_row(e) <= last + 8 * i + lane_column(e);
                    scores[m][i][e] = seen ? p : 0.0f;
                }
            }
        }
        if constexpr (MAKES_VALUES) add_weighted<HEAD, N, M>(value_result, scores, gradient_tile);
        if constexpr (MAKES_KEYS) {
            f32 slopes[M][N / 8][4] = {};
            add_scores<HEAD, N, M>(slopes, value_tile + own_row * PITCH<HEAD>, gradient_tile);
#pragma unroll
            for (i32 i = 0; i < N / 8; i++) {
                f32 of_columns[2] = {from_lane(lane_delta, 8 * i + lane_column(0)),
                                     from_lane(lane_delta, 8 * i + lane_column(1))};
#pragma unroll
                for (i32 m = 0; m < M; m++) {
#pragma unroll
                    for (i32 e = 0; e < 4; e++) scores[m][i][e] *= slopes[m][i][e] - of_columns[e % 2];
                }
            }
            add_weighted<HEAD, N, M>(key_result, scores, query_tile);
        }
    };
    pipeline<STAGES>(query_tiles * group, load, use);
    if constexpr (MAKES_KEYS) {
        auto rows = head_rows(dk, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first + own_row);
        store_rows<HEAD, M>(key_result, rows, scale);
    }
    if constexpr (MAKES_VALUES) {
        auto rows = head_rows(dv, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first + own_row);
        store_rows<HEAD, M>(value_result, rows, 1.0f);
    }
}

// dk and dv in one block where registers hold both, otherwise one of them.
template <i32 HEAD, i32 M, i32 STAGES>
DEVICE void attention_backward_parts(const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const f32* lse,
                                     const f32* delta, const i32* tiles, bf16* dk, bf16* dv, i32 heads, i32 kv_heads, i32 dim,
                                     f32 scale) {
    if constexpr (HEAD <= 128) {
        attention_backward_keys<HEAD, M, STAGES, BOTH>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim, scale);
    } else if (blockIdx.y == 0) {
        attention_backward_keys<HEAD, M, STAGES, VALUES_ONLY>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim,
                                                           scale);
    } else {
        attention_backward_keys<HEAD, M, STAGES, KEYS_ONLY>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim, scale);
    }
}

// Head size; 16-row blocks of a warp, keys and stages forward; blocks, keys and stages of dq; blocks and stages of dk, dv.
#define ATTENTION(head, rows, keys, stages, dq_rows, dq_keys, dq_stages, dk_rows, dk_stages)                                          \
    ENTRY(THREADS)                                                                                                          \
    attention_forward_head##head##_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k,                             \
                                        const bf16* __restrict__ v, const i32* __restrict__ tiles, bf16* __restrict__ out,  \
                                        f32* __restrict__ lse, i32 heads, i32 kv_heads, i32 dim, f32 scale) {               \
        attention_forward<head, rows, keys, stages>(q, k, v, tiles, out, lse, heads, kv_heads, dim, scale);                 \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    attention_backward_queries_head##head##_bf16(                                                                           \
        const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,  \
        const f32* __restrict__ lse, const f32* __restrict__ delta, const i32* __restrict__ tiles, bf16* __restrict__ dq,   \
        i32 heads, i32 kv_heads, i32 dim, f32 scale) {                                                                      \
        attention_backward_queries<head, dq_rows, dq_keys, dq_stages>(q, k, v, dout, lse, delta, tiles, dq, heads,         \
                                                                      kv_heads, dim, scale);                                \
    }                                                                                                                       \
    ENTRY(THREADS, 2)                                                                                                       \
    attention_backward_keys_head##head##_bf16(                                                                              \
        const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,  \
        const f32* __restrict__ lse, const f32* __restrict__ delta, const i32* __restrict__ tiles, bf16* __restrict__ dk,   \
        bf16* __restrict__ dv, i32 heads, i32 kv_heads, i32 dim, f32 scale) {                                               \
        attention_backward_parts<head, dk_rows, dk_stages>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim,  \
                                                           scale);                                                          \
    }
ATTENTION(64, 2, 64, 2, 1, 64, 2, 1, 2)
ATTENTION(80, 2, 64, 2, 1, 32, 2, 1, 2)
ATTENTION(96, 2, 32, 2, 1, 32, 2, 1, 2)
ATTENTION(128, 2, 32, 2, 1, 32, 2, 1, 2)
ATTENTION(256, 1, 32, 2, 1, 32, 1, 1, 1)
