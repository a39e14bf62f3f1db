// Causal attention over packed documents, with plain multiply-adds: any head size, f32 or bf16 activations.
//
// For query row i of a document, head h, key/value head h / (H / K), and the keys j ≤ i + (keys − queries):
//
//   s_ij = scale · q_i · k_j     p_ij = exp(s_ij − lse_i)     o_i = Σ_j p_ij v_j     lse_i = log Σ_j exp(s_ij)
//
//   δ_i  = do_i · o_i            ds_ij = p_ij (do_i · v_j − δ_i)
//   dq_i = scale Σ_j ds_ij k_j   dk_j = scale Σ_i ds_ij q_i         dv_j = Σ_i p_ij do_i
//
// Tensors: q, o, do, dq [Tq, H, D]; k, v, dk, dv [Tk, K, D]; lse, δ [T, H] f32; tiles i32 [n, 5] (attention.cuh).
//
// This is the path of Precision::F32, and of every head size that attention_tensor.cu has no instance for. There the factors of
// the products are rounded to bf16 (`round`), as tensor cores would have them.
//
// Work: 4 D multiply-adds for each pair of query and visible key forward, 8 D + 6 D backward (scores are recomputed by both
// kernels). Limited by arithmetic: a block of 256 threads reads 2 × 2 factors from shared memory for 4 multiply-adds.
//
// Decomposition: a block has 32 queries (forward, dq) or 32 keys (dk, dv) of one head, and passes over the other side 32 at a
// time; rows are read in chunks of 32 elements. Threads form a 16 × 16 grid; each has rows y, y + 16 and columns x, x + 16 of a
// tile of scores, and the same of each chunk of the result. A block makes at most 256 elements of the result's rows (gridDim.y
// covers longer heads and repeats the scores), so registers hold it whatever the head size. dk and dv are summed over the query
// heads of a group in rising order: no atomics.
//
// Numerics: softmax by a running maximum (Milakov & Gimelshein 2018, arXiv 1805.02867) in f32 with exact exponentials; sums over
// a row's keys in rising order. Bits depend on the document alone, not on what it is packed with.

#include "attention.cuh"

constexpr i32 THREADS = 256;
constexpr i32 TILE = 32;       // rows of a tile
constexpr i32 CHUNK = 32;      // elements of a row at a time
constexpr i32 PITCH = CHUNK + 1;
constexpr i32 CHUNKS = 8;      // of a result's row that a block makes
constexpr i32 SIDE = 16;       // threads in each direction
constexpr i32 WARPS = THREADS / WARP_LANES;

DEVICE i32 thread_row() { return i32(threadIdx.x) / SIDE; }
DEVICE i32 thread_column() { return i32(threadIdx.x) % SIDE; }

DEVICE f32 factor(f32 value, i32 round) { return round ? rounded<bf16>(value) : value; }

// Elements first..first + 32 of 32 rows, to shared memory; zero where there is none.
template <class A>
DEVICE void load_chunk(f32* to, const HeadRows<const A>& rows, i32 first, i32 round) {
#pragma unroll
    for (i32 i = 0; i < TILE * CHUNK / THREADS; i++) {
        i32 row = i32(threadIdx.x) / CHUNK + i * (THREADS / CHUNK), column = i32(threadIdx.x) % CHUNK;
        bool exists = row < rows.count && first + column < rows.dim;
        to[row * PITCH + column] = exists ? factor(to_f32(rows.row(row)[first + column]), round) : 0.0f;
    }
}

// out[a][b] += Σ_d left[y + 16 a][d] right[x + 16 b][d]
DEVICE void multiply_rows(f32 (&out)[2][2], const f32* left, const f32* right) {
    const f32* l = left + thread_row() * PITCH;
    const f32* r = right + thread_column() * PITCH;
#pragma unroll
    for (i32 d = 0; d < CHUNK; d++) {
#pragma unroll
        for (i32 a = 0; a < 2; a++) {
#pragma unroll
            for (i32 b = 0; b < 2; b++) out[a][b] += l[a * SIDE * PITCH + d] * r[b * SIDE * PITCH + d];
        }
    }
}

// out[a][b] += Σ_j left[y + 16 a][j] right[j][x + 16 b]
DEVICE void multiply_columns(f32 (&out)[2][2], const f32* left, const f32* right) {
    const f32* l = left + thread_row() * PITCH;
    const f32* r = right + thread_column();
#pragma unroll
    for (i32 j = 0; j < TILE; j++) {
#pragma unroll
        for (i32 a = 0; a < 2; a++) {
#pragma unroll
            for (i32 b = 0; b < 2; b++) out[a][b] += l[a * SIDE * PITCH + j] * r[j * PITCH + b * SIDE];
        }
    }
}

// out += left · rowsᵀ over whole rows; `left_chunk` and `right_chunk` are shared memory. Ends with the last readers under way.
template <class A>
DEVICE void add_scores(f32 (&out)[2][2], const HeadRows<const A>& left, const HeadRows<const A>& right, f32* left_chunk,
                       f32* right_chunk, i32 round) {
    for (i32 first = 0; first < left.dim; first += CHUNK) {
        __syncthreads();
        load_chunk(left_chunk, left, first, round);
        load_chunk(right_chunk, right, first, round);
        __syncthreads();
        multiply_rows(out, left_chunk, right_chunk);
    }
}

// A block's part of the rows of a result: 8 chunks from element `first` on.
struct Result {
    f32 at[CHUNKS][2][2];
    i32 first;
};

DEVICE Result no_result() {
    Result result = {};
    result.first = i32(blockIdx.y) * CHUNKS * CHUNK;
    return result;
}

// result += weights · rows: `weights` [32][32] in shared memory, written before a barrier; `chunk` is shared memory too.
template <class A>
DEVICE void add_weighted(Result& result, const f32* weights, const HeadRows<const A>& rows, f32* chunk, i32 round) {
#pragma unroll
    for (i32 i = 0; i < CHUNKS; i++) {
        i32 first = result.first + i * CHUNK;
        if (first >= rows.dim) break;
        __syncthreads();
        load_chunk(chunk, rows, first, round);
        __syncthreads();
        multiply_columns(result.at[i], weights, chunk);
    }
}

template <class A>
DEVICE void store_result(const Result& result, const HeadRows<A>& rows, const f32 (&factors)[2]) {
#pragma unroll
    for (i32 i = 0; i < CHUNKS; i++) {
#pragma unroll
        for (i32 a = 0; a < 2; a++) {
#pragma unroll
            for (i32 b = 0; b < 2; b++) {
                i32 row = thread_row() + a * SIDE, column = result.first + i * CHUNK + thread_column() + b * SIDE;
                if (row < rows.count && column < rows.dim)
                    rows.row(row)[column] = from_f32<A>(result.at[i][a][b] * factors[a]);
            }
        }
    }
}

template <class A>
DEVICE void attention_forward(const A* q, const A* k, const A* v, const i32* tiles, A* out, f32* lse, i32 heads, i32 kv_heads,
                              i32 dim, f32 scale, i32 round) {
    SHARED(f32, left, TILE * PITCH);
    SHARED(f32, right, TILE * PITCH);
    SHARED(f32, weights, TILE * PITCH);
    i32 head;
    Tile tile = find_tile(tiles, heads, head);
    i32 kv_head = head / (heads / kv_heads);
    auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    i32 here = min(TILE, queries.count);
    i32 visible = tile.first + here + tile.extra_keys();
    Result result = no_result();
    f32 largest[2] = {-infinity(), -infinity()}, sum[2] = {0.0f, 0.0f};
    for (i32 key = 0; key < visible; key += TILE) {
        f32 scores[2][2] = {};
        add_scores(scores, queries, keys.from(key), left, right, round);
#pragma unroll
        for (i32 a = 0; a < 2; a++) {
            i32 last = tile.first + thread_row() + a * SIDE + tile.extra_keys();
            f32 masked[2], weight[2];
#pragma unroll
            for (i32 b = 0; b < 2; b++) {
                bool seen = key + thread_column() + b * SIDE <= last;
                masked[b] = seen ? scores[a][b] * scale : -infinity();
            }
            // Every row sees key 0, so that the maximum is never −∞ after the first tile.
            f32 highest = lanes_max<SIDE>(max(largest[a], max(masked[0], masked[1])));
            f32 correction = expf(largest[a] - highest);
#pragma unroll
            for (i32 b = 0; b < 2; b++) {
                weight[b] = expf(masked[b] - highest);
                weights[(thread_row() + a * SIDE) * PITCH + thread_column() + b * SIDE] = factor(weight[b], round);
            }
            sum[a] = sum[a] * correction + lanes_sum<SIDE>(weight[0] + weight[1]);
            largest[a] = highest;
#pragma unroll
            for (i32 i = 0; i < CHUNKS; i++) result.at[i][a][0] *= correction, result.at[i][a][1] *= correction;
        }
        add_weighted(result, weights, values.from(key), left, round);
    }
    f32 factors[2] = {1.0f / sum[0], 1.0f / sum[1]};
    store_result(result, head_rows(out, heads, dim, head, tile.query_start, tile.queries).from(tile.first), factors);
    if (blockIdx.y == 0 && thread_column() == 0) {
        for (i32 a = 0; a < 2; a++) {
            i32 row = thread_row() + a * SIDE;
            if (row < here) lse[i64(tile.query_start + tile.first + row) * heads + head] = largest[a] + logf(sum[a]);
        }
    }
}

// delta[row] = Σ_d dout[row][d] out[row][d], a warp for each of the T · H rows.
template <class A>
DEVICE void attention_delta(const A* out, const A* dout, f32* delta, i64 rows, i32 dim) {
    i64 row = i64(blockIdx.x) * WARPS + warp_index();
    if (row >= rows) return;
    bool aligned = dim % PACK == 0;
    f32 sum = 0.0f;
    for (i32 first = lane_index() * PACK; first < dim; first += WARP_LANES * PACK) {
        Pack a = load_pack(out + row * dim, first, dim, aligned), b = load_pack(dout + row * dim, first, dim, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum += a.at[i] * b.at[i];
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) delta[row] = sum;
}

template <class A>
DEVICE void attention_backward_queries(const A* q, const A* k, const A* v, const A* dout, const f32* lse, const f32* delta,
                                       const i32* tiles, A* dq, i32 heads, i32 kv_heads, i32 dim, f32 scale, i32 round) {
    SHARED(f32, left, TILE * PITCH);
    SHARED(f32, right, TILE * PITCH);
    SHARED(f32, weights, TILE * PITCH);
    i32 head;
    Tile tile = find_tile(tiles, heads, head);
    i32 kv_head = head / (heads / kv_heads);
    auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto gradients = head_rows(dout, heads, dim, head, tile.query_start, tile.queries).from(tile.first);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys);
    i32 here = min(TILE, queries.count);
    f32 row_lse[2], row_delta[2];
#pragma unroll
    for (i32 a = 0; a < 2; a++) {
        i32 row = thread_row() + a * SIDE;
        i64 at = i64(tile.query_start + tile.first + row) * heads + head;
        row_lse[a] = row < here ? lse[at] : 0.0f;
        row_delta[a] = row < here ? delta[at] : 0.0f;
    }
    Result result = no_result();
    for (i32 key = 0; key < tile.first + here; key += TILE) {
        f32 scores[2][2] = {}, slopes[2][2] = {};
        add_scores(scores, queries, keys.from(key), left, right, round);
        add_scores(slopes, gradients, values.from(key), left, right, round);
#pragma unroll
        for (i32 a = 0; a < 2; a++) {
#pragma unroll
            for (i32 b = 0; b < 2; b++) {
                i32 row = thread_row() + a * SIDE, column = thread_column() + b * SIDE;
                bool seen = row < here && key + column <= tile.first + row;
                f32 p = seen ? expf(scores[a][b] * scale - row_lse[a]) : 0.0f;
                weights[row * PITCH + column] = factor(seen ? p * (slopes[a][b] - row_delta[a]) : 0.0f, round);
            }
        }
        add_weighted(result, weights, keys.from(key), left, round);
    }
    f32 factors[2] = {scale, scale};
    store_result(result, head_rows(dq, heads, dim, head, tile.query_start, tile.queries).from(tile.first), factors);
}

template <class A>
DEVICE void attention_backward_keys(const A* q, const A* k, const A* v, const A* dout, const f32* lse, const f32* delta,
                                    const i32* tiles, A* dk, A* dv, i32 heads, i32 kv_heads, i32 dim, f32 scale, i32 round) {
    SHARED(f32, left, TILE * PITCH);
    SHARED(f32, right, TILE * PITCH);
    SHARED(f32, weights, TILE * PITCH);
    SHARED(f32, slope_weights, TILE * PITCH);
    i32 kv_head;
    Tile tile = find_tile(tiles, kv_heads, kv_head);
    auto keys = head_rows(k, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first);
    auto values = head_rows(v, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first);
    Result key_result = no_result(), value_result = no_result();
    i32 group = heads / kv_heads;
    for (i32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        auto queries = head_rows(q, heads, dim, head, tile.query_start, tile.queries);
        auto gradients = head_rows(dout, heads, dim, head, tile.query_start, tile.queries);
        for (i32 query = tile.first; query < tile.queries; query += TILE) {
            f32 scores[2][2] = {}, slopes[2][2] = {};
            add_scores(scores, keys, queries.from(query), left, right, round);
            add_scores(slopes, values, gradients.from(query), left, right, round);
#pragma unroll
            for (i32 b = 0; b < 2; b++) {
                i32 column = thread_column() + b * SIDE;
                bool exists = query + column < tile.queries;
                i64 at = i64(tile.query_start + query + column) * heads + head;
                f32 query_lse = exists ? lse[at] : 0.0f, query_delta = exists ? delta[at] : 0.0f;
#pragma unroll
                for (i32 a = 0; a < 2; a++) {
                    i32 row = thread_row() + a * SIDE;
                    bool seen = exists && tile.first + row <= query + column;
                    f32 p = seen ? expf(scores[a][b] * scale - query_lse) : 0.0f;
                    weights[row * PITCH + column] = factor(p, round);
                    slope_weights[row * PITCH + column] = factor(seen ? p * (slopes[a][b] - query_delta) : 0.0f, round);
                }
            }
            add_weighted(value_result, weights, gradients.from(query), left, round);
            add_weighted(key_result, slope_weights, queries.from(query), left, round);
        }
    }
    f32 factors[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
    store_result(key_result, head_rows(dk, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first), factors);
    store_result(value_result, head_rows(dv, kv_heads, dim, kv_head, tile.key_start, tile.keys).from(tile.first), ones);
}

#define ATTENTION(A)                                                                                                        \
    ENTRY(THREADS)                                                                                                          \
    attention_forward_tiled_##A(const A* __restrict__ q, const A* __restrict__ k, const A* __restrict__ v,                  \
                                const i32* __restrict__ tiles, A* __restrict__ out, f32* __restrict__ lse, i32 heads,       \
                                i32 kv_heads, i32 dim, f32 scale, i32 round) {                                              \
        attention_forward<A>(q, k, v, tiles, out, lse, heads, kv_heads, dim, scale, round);                                 \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    attention_delta_##A(const A* __restrict__ out, const A* __restrict__ dout, f32* __restrict__ delta, i64 rows,           \
                        i32 dim) {                                                                                          \
        attention_delta<A>(out, dout, delta, rows, dim);                                                                    \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    attention_backward_queries_tiled_##A(const A* __restrict__ q, const A* __restrict__ k, const A* __restrict__ v,         \
                                         const A* __restrict__ dout, const f32* __restrict__ lse,                           \
                                         const f32* __restrict__ delta, const i32* __restrict__ tiles,                      \
                                         A* __restrict__ dq, i32 heads, i32 kv_heads, i32 dim, f32 scale, i32 round) {      \
        attention_backward_queries<A>(q, k, v, dout, lse, delta, tiles, dq, heads, kv_heads, dim, scale, round);            \
    }                                                                                                                       \
    ENTRY(THREADS)                                                                                                          \
    attention_backward_keys_tiled_##A(const A* __restrict__ q, const A* __restrict__ k, const A* __restrict__ v,            \
                                      const A* __restrict__ dout, const f32* __restrict__ lse,                              \
                                      const f32* __restrict__ delta, const i32* __restrict__ tiles, A* __restrict__ dk,     \
                                      A* __restrict__ dv, i32 heads, i32 kv_heads, i32 dim, f32 scale, i32 round) {         \
        attention_backward_keys<A>(q, k, v, dout, lse, delta, tiles, dk, dv, heads, kv_heads, dim, scale, round);           \
    }
ATTENTION(f32)
ATTENTION(bf16)
