// The gated delta rule of `gated_delta.cu` with as little as possible between one chunk and the next: bf16, heads whose rows are
// multiples of eight elements, keys of up to 128.
//
// What a chunk does to the state is linear in the state. With W = A diag(β e^c) K and U = A diag(β) V, which know nothing of it,
//
//   u  = U − W S                           S' = e^{c_n} S + Kᵀ (f ⊙ u)                f_i = e^{c_n − c_i}
//   o  = scale (e^c ⊙ Q S + P u)           P_ij = (q_i · k_j) e^{c_i − c_j}, j ≤ i
//
// and backward, for E = dS', with D = scale Pᵀ do and G = scale Qᵀ (e^c ⊙ do), which know nothing of E,
//
//   du = D + f ⊙ (K E)                     dS = e^{c_n} E + G − Wᵀ du
//   dr = Aᵀ du                             dv = β ⊙ dr
//
// So both passes carry a state by the same two products: X S, then Yᵀ of what that gives, (X, Y) = (W, K) forward and (K, W)
// backward. All else is done chunk by chunk at once, before (`delta_factors`, `delta_pulls`) and after (`delta_outputs`,
// `delta_residuals`, and `delta_gradients` of the other file).
//
// Tensors, all bf16 but where it is said: q, k [T, Hk, Dk]; v, o, do, dr, dv [T, Hv, Dv]; W [T, Hv, Dk]; `values` [T, Hv, Dv], U and
// then u in the same place, or D and then du; `states` [chunks, Hv, Dk, Dv], the state before each chunk, or G and then the
// gradient of the state behind each chunk; A f32 [T, Hv, 64]; g, β f32 [T, Hv]; `fades` f32 [chunks, Hv, 65], f of a chunk's rows and
// e^{c_n}. `chunks`, `documents` and the sharing of heads as there.
//
// Work of the carry, for D = Dk = Dv: 2 D² multiply-adds a token and head. Bytes a token and head at D = 128: W, U, u, a half of K
// (which the heads of a group share) and two rows of states, 11 D; backward also two rows of G, 15 D. With 32 heads that is 45 KB a
// token, 0.67 µs a chunk at 4.3 TB/s.
//
// Decomposition. `delta_carry`: a block has a document, a head and 32 columns of the state; each of its four warps keeps a quarter
// of the state's rows in registers, as sums of products. A copy in bf16 is in shared memory, where the first product reads it: each
// warp does 16 of the chunk's rows; what it gives is written next to it, and read by the second product, whose sums are the state.
// So a chunk takes two barriers. W and K of the next chunk come by cp.async meanwhile, U and G to registers. The others: a block a
// chunk and head, four warps with 16 rows each, over columns in strips of 64.
//
// Numerics: factors of products are rounded to bf16, and so are W, U, D and G; S, E and all sums are f32. Each sum has the same order
// whatever else is in the batch.

#include "delta.cuh"

constexpr i32 THREADS = 128;
constexpr i32 WARP_ROWS = 16;
static_assert(THREADS / WARP_LANES * WARP_ROWS == CHUNK, "the warps of a block share a chunk's rows");
// Columns of the state of a block of `delta_carry`, and of a strip of the others.
constexpr i32 COLUMNS = 32;
constexpr i32 STRIP = 64;
constexpr i32 FADES = CHUNK + 1;

// Elements from one row to the next of a tile in shared memory: 16 bytes more than it has, so that eight rows of one column of
// chunks of 16 bytes lie in eight groups of banks.
template <i32 WIDTH>
constexpr i32 PITCH = WIDTH + PACK;
constexpr i32 COLUMN_PITCH = PITCH<COLUMNS>, STRIP_PITCH = PITCH<STRIP>;

// ---- fragments -----------------------------------------------------------------------------------------------------

// A tile in shared memory, rows WIDTH elements apart. A lane's place in it is found once; what is constant costs nothing.
template <i32 WIDTH>
struct Tile {
    bf16* at;

    static constexpr DEVICE i32 bytes(i32 row, i32 column) { return (row * WIDTH + column) * i32(sizeof(bf16)); }
    DEVICE bf16* place(i32 row, i32 column) const { return at + row * WIDTH + column; }
    DEVICE SharedAddress address(i32 row, i32 column) const { return shared_place(at) + bytes(row, column); }
    // 16 × 16 elements as a left factor, from this row and depth on: the tile's rows are the factor's.
    DEVICE void left(u32 (&a)[4], i32 row, i32 depth) const {
        i32 lane = lane_index();
        load_matrices(a, address(lane % 16, lane / 16 * 8) + bytes(row, depth));
    }
    // The same where the tile's rows run along the depth.
    DEVICE void left_turned(u32 (&a)[4], i32 row, i32 depth) const {
        i32 lane = lane_index();
        load_matrices_transposed(a, address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8) + bytes(depth, row));
    }
    // 16 × 16 elements as a right factor, two fragments of eight columns: the tile's rows are the factor's columns.
    DEVICE void right(u32 (&b)[4], i32 column, i32 depth) const {
        i32 lane = lane_index();
        load_matrices(b, address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8) + bytes(column, depth));
    }
    // The same where the tile's rows run along the depth.
    DEVICE void right_turned(u32 (&b)[4], i32 column, i32 depth) const {
        i32 lane = lane_index();
        load_matrices_transposed(b, address(lane % 16, lane / 16 * 8) + bytes(depth, column));
    }
};

// 16 rows by 8 · N columns of sums, of a warp.
template <i32 N>
struct Sums {
    f32 at[N][4];

    DEVICE void clear() {
#pragma unroll
        for (i32 n = 0; n < N; n++)
#pragma unroll
            for (i32 i = 0; i < 4; i++) at[n][i] = 0.0f;
    }
    // Calls `visit(row, column, left, right)` for each two neighbours that this lane has, rows counted from the warp's first.
    template <class Visit>
    DEVICE void each(Visit visit) {
        i32 row = lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll
        for (i32 n = 0; n < N; n++) {
            visit(row, n * 8 + column, at[n][0], at[n][1]);
            visit(row + 8, n * 8 + column, at[n][2], at[n][3]);
        }
    }
    // Sums 2 i and 2 i + 1, rounded, as a left factor of depth 16.
    DEVICE void as_left(u32 (&a)[4], i32 i) const {
        a[0] = bf16_pair(at[2 * i][0], at[2 * i][1]);
        a[1] = bf16_pair(at[2 * i][2], at[2 * i][3]);
        a[2] = bf16_pair(at[2 * i + 1][0], at[2 * i + 1][1]);
        a[3] = bf16_pair(at[2 * i + 1][2], at[2 * i + 1][3]);
    }
    // sums[2 n], sums[2 n + 1] += a · b.
    DEVICE void add(i32 n, const u32 (&a)[4], const u32 (&b)[4]) {
        u32 first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_add(at[2 * n], a, first);
        multiply_add(at[2 * n + 1], a, second);
    }
    // += a · the tile's columns, its rows from `depth` on along the depth.
    template <i32 WIDTH>
    DEVICE void add_columns(const u32 (&a)[4], const Tile<WIDTH>& right, i32 depth) {
#pragma unroll
        for (i32 n = 0; n < N / 2; n++) {
            u32 b[4];
            right.right_turned(b, n * 16, depth);
            add(n, a, b);
        }
    }
};

DEVICE f32 low_of(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE f32 high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE u32 pair_at(const bf16* at) { return *reinterpret_cast<const u32*>(at); }
DEVICE void set_pair(bf16* at, f32 left, f32 right) { *reinterpret_cast<u32*>(at) = bf16_pair(left, right); }

// What this thread copies of a head's rows, of which there are ROWS in a tile: the same columns of every STEP-th.
template <i32 ROWS, i32 WIDTH>
struct Feed {
    static constexpr i32 PACKS = WIDTH / PACK, STEP = THREADS / PACKS;
    const bf16* from;
    i64 stride;
    bool inside;

    static DEVICE i32 row() { return i32(threadIdx.x) / PACKS; }
    static DEVICE i32 column() { return i32(threadIdx.x) % PACKS * PACK; }
    // Of columns from `skipped` on.
    template <class T>
    DEVICE Feed(const HeadRows<T>& rows, i32 skipped)
        : from(rows.at + row() * rows.stride + skipped + column()), stride(rows.stride), inside(skipped + column() < rows.width) {}
    // Begins to copy `count` rows, `further` rows on; the tile's other elements become zero.
    DEVICE void bring(const Tile<PITCH<WIDTH>>& tile, i64 further, i32 count) const {
        const bf16* at = from + further * stride;
        SharedAddress to = tile.address(row(), column());
#pragma unroll
        for (i32 first = 0; first < ROWS; first += STEP) {
            copy_async(to + tile.bytes(first, 0), at, inside && row() + first < count);
            at += STEP * stride;
        }
    }
};

template <i32 ROWS, i32 WIDTH, class T>
DEVICE void bring(const Tile<PITCH<WIDTH>>& tile, const HeadRows<T>& from, i32 skipped) {
    Feed<ROWS, WIDTH>(from, skipped).bring(tile, 0, from.count);
}

// All threads call it: what they have begun to copy is there, and what they have written.
DEVICE void arrive() {
    copies_commit();
    copies_wait<0>();
    __syncthreads();
}

// The chunk and head of a block.
struct Place {
    i32 head, first, rows;
    i64 of_head;  // among the heads of all chunks

    DEVICE Place(const i32* chunks, Heads heads)
        : head(i32(blockIdx.y)), first(chunks[2 * blockIdx.x]), rows(chunks[2 * blockIdx.x + 1]),
          of_head(i64(blockIdx.x) * heads.value_heads + blockIdx.y) {}
    template <class T>
    DEVICE HeadRows<T> keys(T* tensor, Heads heads) const {
        return HeadRows<T>(tensor, first, rows, heads.key_heads, heads.key_head(head), heads.key_dim);
    }
    template <class T>
    DEVICE HeadRows<T> of_heads(T* tensor, Heads heads, i32 width) const {
        return HeadRows<T>(tensor, first, rows, heads.value_heads, head, width);
    }
    template <class T>
    DEVICE HeadRows<T> state(T* tensor, Heads heads) const {
        return HeadRows<T>(tensor + of_head * heads.key_dim * heads.value_dim, 0, heads.key_dim, 1, 0, heads.value_dim);
    }
};

// Stores a warp's sums as columns from `skipped` on of its 16 rows.
template <i32 N>
DEVICE void store(Sums<N>& sums, const HeadRows<bf16>& to, i32 first_row, i32 skipped) {
    sums.each([&](i32 row, i32 column, f32 left, f32 right) {
        if (to.has(first_row + row, skipped + column))
            set_pair(to.at + (first_row + row) * to.stride + skipped + column, left, right);
    });
}

// ---- before the carry ----------------------------------------------------------------------------------------------

// W, U and the fades.
DEVICE void factors(const bf16* k, const bf16* v, const f32* decay, const f32* beta, const f32* solved, const i32* chunks, bf16* w,
                    bf16* values, f32* fades, Heads heads) {
    DYNAMIC_SHARED(memory);
    Tile<STRIP_PITCH> with_decay{reinterpret_cast<bf16*>(memory)}, without{with_decay.place(CHUNK, 0)};
    Tile<STRIP_PITCH> strip{without.place(CHUNK, 0)};
    Gates gates(reinterpret_cast<f32*>(strip.place(CHUNK, 0)));
    Place place(chunks, heads);
    if (place.rows == 0) return;  // a place for documents of another batch
    gates.load(decay, beta, place.first, place.rows, heads.value_heads, place.head);
    f32* of_fades = fades + place.of_head * FADES;
    i32 thread = i32(threadIdx.x);
    if (thread < CHUNK) of_fades[thread] = gates.to_end[thread];
    if (thread == CHUNK) of_fades[CHUNK] = gates.from_start[place.rows - 1];
    HeadRows<const f32> inverse = place.of_heads(solved, heads, CHUNK);
    for (i32 i = thread; i < CHUNK * CHUNK / 2; i += THREADS) {
        i32 row = i / (CHUNK / 2), j = i % (CHUNK / 2) * 2;
        f32 left = inverse.get(row, j) * gates.beta[j], right = inverse.get(row, j + 1) * gates.beta[j + 1];
        set_pair(without.place(row, j), left, right);
        set_pair(with_decay.place(row, j), left * gates.from_start[j], right * gates.from_start[j + 1]);
    }
    i32 own = warp_index() * WARP_ROWS;
    auto multiply = [&](const Tile<STRIP_PITCH>& matrix, const HeadRows<const bf16>& from, const HeadRows<bf16>& to) {
        for (i32 skipped = 0; skipped < from.width; skipped += STRIP) {
            __syncthreads();  // the last strip's readers are done
            bring<CHUNK, STRIP>(strip, from, skipped);
            arrive();
            Sums<STRIP / 8> sums;
            sums.clear();
            for (i32 depth = 0; depth <= own; depth += 16) {  // nothing beyond the diagonal
                u32 a[4];
                matrix.left(a, own, depth);
                sums.add_columns(a, strip, depth);
            }
            store(sums, to, own, skipped);
        }
    };
    multiply(with_decay, place.keys(k, heads), place.of_heads(w, heads, heads.key_dim));
    multiply(without, place.of_heads(v, heads, heads.value_dim), place.of_heads(values, heads, heads.value_dim));
}

// D and G.
template <i32 KEY>
DEVICE void pulls(const bf16* q, const bf16* k, const f32* decay, const f32* beta, const bf16* dout, const i32* chunks, bf16* values,
                  bf16* dstates, Heads heads, f32 scale) {
    DYNAMIC_SHARED(memory);
    Tile<PITCH<KEY>> query{reinterpret_cast<bf16*>(memory)}, key{query.place(CHUNK, 0)};
    Tile<STRIP_PITCH> strip{key.place(CHUNK, 0)}, faded{strip.place(CHUNK, 0)};
    Gates gates(reinterpret_cast<f32*>(faded.place(CHUNK, 0)));
    Place place(chunks, heads);
    if (place.rows == 0) return;
    HeadRows<const bf16> gradient = place.of_heads(dout, heads, heads.value_dim);
    bring<CHUNK, KEY>(query, place.keys(q, heads), 0);
    bring<CHUNK, KEY>(key, place.keys(k, heads), 0);
    bring<CHUNK, STRIP>(strip, gradient, 0);
    gates.load(decay, beta, place.first, place.rows, heads.value_heads, place.head);
    arrive();
    // Pᵀ: this warp's rows are keys.
    i32 own = warp_index() * WARP_ROWS;
    Sums<CHUNK / 8> scores;
    scores.clear();
    for (i32 depth = 0; depth < KEY; depth += 16) {
        u32 a[4];
        key.left(a, own, depth);
#pragma unroll
        for (i32 n = 0; n < CHUNK / 16; n++) {
            if (n * 16 < own) continue;
            u32 b[4];
            query.right(b, n * 16, depth);
            scores.add(n, a, b);
        }
    }
    scores.each([&](i32 row, i32 i, f32& left, f32& right) {
        i32 j = own + row;
        left = j <= i ? scale * left * gates.between(i, j) : 0.0f;
        right = j <= i + 1 ? scale * right * gates.between(i + 1, j) : 0.0f;
    });
    HeadRows<bf16> of_values = place.of_heads(values, heads, heads.value_dim), of_states = place.state(dstates, heads);
    for (i32 skipped = 0; skipped < heads.value_dim; skipped += STRIP) {
        if (skipped != 0) {
            __syncthreads();  // the last strip's readers are done
            bring<CHUNK, STRIP>(strip, gradient, skipped);
            arrive();
        }
#pragma unroll
        for (i32 i = i32(threadIdx.x); i < CHUNK * STRIP / PACK; i += THREADS) {
            i32 row = i / (STRIP / PACK), column = i % (STRIP / PACK) * PACK;
            Pack pack;
            load_wide(pack, strip.place(row, column));
            f32 fade = scale * gates.from_start[row];
#pragma unroll
            for (i32 e = 0; e < PACK; e++) pack.at[e] *= fade;
            store_wide(faded.place(row, column), pack);
        }
        __syncthreads();
        Sums<STRIP / 8> sums;
        sums.clear();
#pragma unroll
        for (i32 n = 0; n < CHUNK / 16; n++) {
            if (n * 16 < own) continue;
            u32 a[4];
            scores.as_left(a, n);
            sums.add_columns(a, strip, n * 16);
        }
        store(sums, of_values, own, skipped);
        for (i32 row = own; row < heads.key_dim; row += CHUNK) {
            sums.clear();
#pragma unroll
            for (i32 depth = 0; depth < CHUNK; depth += 16) {
                u32 a[4];
                query.left_turned(a, row, depth);
                sums.add_columns(a, faded, depth);
            }
            store(sums, of_states, row, skipped);
        }
    }
}

// ---- the carry -----------------------------------------------------------------------------------------------------

// What a lane needs of a chunk besides the factors: asked for a chunk early.
template <i32 TILES>
struct Increment {
    u32 value[2][COLUMNS / 8], state[2 * TILES][COLUMNS / 8];
    f32 fade[2], whole;
};

// A warp's rows of the state.
template <i32 TILES>
struct State {
    Sums<COLUMNS / 8> at[TILES];

    // Calls `visit(row of the state, column of the block, left, right)` for each two neighbours that this lane has.
    template <class Visit>
    DEVICE void each(Visit visit) {
        i32 own = warp_index() * WARP_ROWS * TILES;
#pragma unroll
        for (i32 m = 0; m < TILES; m++)
            at[m].each([&](i32 row, i32 j, f32& left, f32& right) { visit(own + m * WARP_ROWS + row, j, left, right); });
    }
};

// BACK: from the last chunk to the first. KEY: the keys' length, or the next of 64 and 128.
template <bool BACK, i32 KEY>
DEVICE void carry(const bf16* k, const bf16* w, const f32* fades, const i32* documents, f32* last_state, bf16* values, bf16* states,
                  Heads heads) {
    constexpr i32 TILES = KEY / CHUNK;  // of 16 rows of the state, that a warp has
    constexpr i32 PARTS = COLUMNS / 8;
    using Factor = Tile<PITCH<KEY>>;
    constexpr i32 FACTOR = CHUNK * PITCH<KEY>;
    DYNAMIC_SHARED(memory);
    Tile<COLUMN_PITCH> state_tile{reinterpret_cast<bf16*>(memory)}, value_tile{state_tile.place(KEY, 0)};
    bf16* factors = value_tile.place(CHUNK, 0);  // two chunks' X and Y
    i32 head = i32(blockIdx.y), column = i32(blockIdx.z) * COLUMNS;
    i32 start = documents[3 * blockIdx.x], end = documents[3 * blockIdx.x + 1];
    i32 steps = (end - start + CHUNK - 1) / CHUNK;
    if (steps == 0) return;
    i64 chunks = documents[3 * blockIdx.x + 2];
    auto chunk_of = [&](i32 step) { return BACK ? steps - 1 - step : step; };
    auto rows_of = [&](i32 chunk) { return min(CHUNK, end - start - chunk * CHUNK); };

    HeadRows<const bf16> of_w(w, start, end - start, heads.value_heads, head, heads.key_dim);
    HeadRows<const bf16> of_k(k, start, end - start, heads.key_heads, heads.key_head(head), heads.key_dim);
    Feed<CHUNK, KEY> feed_x(BACK ? of_k : of_w, 0), feed_y(BACK ? of_w : of_k, 0);
    auto begin = [&](i32 step) {
        i32 chunk = chunk_of(step), rows = rows_of(chunk);
        Factor x{factors + step % 2 * 2 * FACTOR}, y{x.place(CHUNK, 0)};
        feed_x.bring(x, i64(chunk) * CHUNK, rows);
        feed_y.bring(y, i64(chunk) * CHUNK, rows);
    };

    i32 own = warp_index() * WARP_ROWS, own_state = own * TILES;  // this warp's rows of a chunk, and of the state
    i32 row = own + lane_index() / 4, state_row = own_state + lane_index() / 4, right = lane_index() % 4 * 2;
    i32 parts = (heads.value_dim - column) / 8;  // so many eights of columns exist
    i64 stride = i64(heads.value_heads) * heads.value_dim, state_size = i64(heads.key_dim) * heads.value_dim;
    bf16* of_values = values + (i64(start) + row) * stride + i64(head) * heads.value_dim + column + right;
    bf16* of_states = states + (chunks * heads.value_heads + head) * state_size;
    const f32* of_fades = fades + (chunks * heads.value_heads + head) * FADES;
    i64 chunk_states = heads.value_heads * state_size, chunk_fades = i64(heads.value_heads) * FADES;
    auto fetch = [&](i32 step) {
        Increment<TILES> increment = {};
        i32 chunk = chunk_of(step), rows = rows_of(chunk);
        const bf16* value = of_values + chunk * CHUNK * stride;
        const bf16* state = of_states + chunk * chunk_states + i64(state_row) * heads.value_dim + column + right;
        const f32* fade = of_fades + chunk * chunk_fades;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            increment.fade[half] = fade[row + 8 * half];
#pragma unroll
            for (i32 n = 0; n < PARTS; n++)
                if (n < parts && row + 8 * half < rows) increment.value[half][n] = pair_at(value + 8 * half * stride + 8 * n);
        }
        increment.whole = fade[CHUNK];
        if constexpr (BACK) {
#pragma unroll
            for (i32 m = 0; m < 2 * TILES; m++)
#pragma unroll
                for (i32 n = 0; n < PARTS; n++)
                    if (n < parts && state_row + 8 * m < heads.key_dim)
                        increment.state[m][n] = pair_at(state + i64(8 * m) * heads.value_dim + 8 * n);
        }
        return increment;
    };
    // The copies of the state that are stored: 16 bytes a thread of each COPIED-th row.
    constexpr i32 COPIED = THREADS / (COLUMNS / PACK);
    i32 copied_row = i32(threadIdx.x) / (COLUMNS / PACK), copied_column = i32(threadIdx.x) % (COLUMNS / PACK) * PACK;
    bf16* of_copies = of_states + i64(copied_row) * heads.value_dim + column + copied_column;

    State<TILES> state;
    f32* whole_state = last_state;
    if (whole_state != nullptr) whole_state += (i64(blockIdx.x) * heads.value_heads + head) * state_size;
    auto inside = [&](i32 d, i32 j) { return d < heads.key_dim && column + j < heads.value_dim; };
    state.each([&](i32 d, i32 j, f32& left, f32& right) {
        left = 0.0f, right = 0.0f;
        if (whole_state == nullptr || !inside(d, j)) return;
        const f32* from = whole_state + i64(d) * heads.value_dim + column + j;
        left = from[0], right = from[1];
    });
    begin(0);
    Increment<TILES> next = fetch(0);
    for (i32 step = 0; step < steps; step++) {
        i32 chunk = chunk_of(step), rows = rows_of(chunk);
        state.each([&](i32 d, i32 j, f32 left, f32 right) { set_pair(state_tile.place(d, j), left, right); });
        arrive();
        Increment<TILES> increment = next;
        if (step + 1 < steps) {
            begin(step + 1);
            next = fetch(step + 1);
        }
#pragma unroll
        for (i32 d = 0; d < KEY; d += COPIED)
            if (inside(copied_row + d, copied_column))
                *reinterpret_cast<uint4*>(of_copies + chunk * chunk_states + i64(d) * heads.value_dim) =
                    *reinterpret_cast<const uint4*>(state_tile.place(copied_row + d, copied_column));

        Factor x{factors + step % 2 * 2 * FACTOR}, y{x.place(CHUNK, 0)};
        Sums<PARTS> value;
        value.clear();
#pragma unroll
        for (i32 depth = 0; depth < KEY; depth += 16) {
            u32 a[4];
            x.left(a, own, depth);
            value.add_columns(a, state_tile, depth);
        }
        bf16* to = of_values + chunk * CHUNK * stride;
#pragma unroll
        for (i32 half = 0; half < 2; half++)
#pragma unroll
            for (i32 n = 0; n < PARTS; n++) {
                f32 fade = increment.fade[half], low = low_of(increment.value[half][n]), high = high_of(increment.value[half][n]);
                f32 factor = BACK ? fade : -1.0f, passed = BACK ? -1.0f : fade;
                low += factor * value.at[n][2 * half], high += factor * value.at[n][2 * half + 1];
                if (n < parts && row + 8 * half < rows) set_pair(to + 8 * half * stride + 8 * n, low, high);
                set_pair(value_tile.place(row + 8 * half, right + 8 * n), passed * low, passed * high);
            }
        if (step + 1 == steps && whole_state == nullptr) return;
        __syncthreads();  // the state's readers are done, and the values' writers
#pragma unroll
        for (i32 m = 0; m < TILES; m++)
#pragma unroll
            for (i32 n = 0; n < PARTS; n++)
#pragma unroll
                for (i32 i = 0; i < 4; i++) {
                    u32 pair = increment.state[2 * m + i / 2][n];
                    f32 added = i % 2 == 0 ? low_of(pair) : high_of(pair);
                    state.at[m].at[n][i] = increment.whole * state.at[m].at[n][i] + (BACK ? added : 0.0f);
                }
#pragma unroll
        for (i32 depth = 0; depth < CHUNK; depth += 16)
#pragma unroll
            for (i32 m = 0; m < TILES; m++) {
                u32 a[4];
                y.left_turned(a, own_state + m * WARP_ROWS, depth);
                state.at[m].add_columns(a, value_tile, depth);
            }
    }
    state.each([&](i32 d, i32 j, f32 left, f32 right) {
        if (!inside(d, j)) return;
        f32* to = whole_state + i64(d) * heads.value_dim + column + j;
        to[0] = left, to[1] = right;
    });
}

// ---- after it ------------------------------------------------------------------------------------------------------

template <i32 KEY>
DEVICE void outputs(const bf16* q, const bf16* k, const bf16* values, const bf16* states, const f32* decay, const f32* beta,
                    const i32* chunks, bf16* out, Heads heads, f32 scale) {
    DYNAMIC_SHARED(memory);
    Tile<PITCH<KEY>> query{reinterpret_cast<bf16*>(memory)}, key{query.place(CHUNK, 0)};
    Tile<STRIP_PITCH> strip{key.place(CHUNK, 0)}, state{strip.place(CHUNK, 0)};
    Gates gates(reinterpret_cast<f32*>(state.place(KEY, 0)));
    Place place(chunks, heads);
    if (place.rows == 0) return;
    HeadRows<const bf16> of_values = place.of_heads(values, heads, heads.value_dim), of_states = place.state(states, heads);
    HeadRows<bf16> result = place.of_heads(out, heads, heads.value_dim);
    bring<CHUNK, KEY>(query, place.keys(q, heads), 0);
    bring<CHUNK, KEY>(key, place.keys(k, heads), 0);
    gates.load(decay, beta, place.first, place.rows, heads.value_heads, place.head);
    i32 own = warp_index() * WARP_ROWS;
    Sums<CHUNK / 8> scores;
    scores.clear();
    for (i32 skipped = 0; skipped < heads.value_dim; skipped += STRIP) {
        if (skipped != 0) __syncthreads();  // the last strip's readers are done
        bring<CHUNK, STRIP>(strip, of_values, skipped);
        bring<KEY, STRIP>(state, of_states, skipped);
        arrive();
        Sums<STRIP / 8> sums;
        sums.clear();
        for (i32 depth = 0; depth < KEY; depth += 16) {
            u32 a[4];
            query.left(a, own, depth);
            sums.add_columns(a, state, depth);
            if (skipped != 0) continue;
#pragma unroll
            for (i32 n = 0; n < CHUNK / 16; n++) {
                if (n * 16 > own) continue;
                u32 b[4];
                key.right(b, n * 16, depth);
                scores.add(n, a, b);
            }
        }
        if (skipped == 0)
            scores.each([&](i32 row, i32 j, f32& left, f32& right) {
                i32 i = own + row;
                left = j <= i ? left * gates.between(i, j) : 0.0f;
                right = j + 1 <= i ? right * gates.between(i, j + 1) : 0.0f;
            });
        sums.each([&](i32 row, i32, f32& left, f32& right) {
            f32 fade = gates.from_start[own + row];
            left *= fade, right *= fade;
        });
#pragma unroll
        for (i32 n = 0; n < CHUNK / 16; n++) {
            if (n * 16 > own) continue;
            u32 a[4];
            scores.as_left(a, n);
            sums.add_columns(a, strip, n * 16);
        }
        sums.each([&](i32, i32, f32& left, f32& right) { left *= scale, right *= scale; });
        store(sums, result, own, skipped);
    }
}

// du becomes dr in its place; dv.
DEVICE void residuals(const f32* beta, const f32* solved, const i32* chunks, bf16* values, bf16* dv, Heads heads) {
    DYNAMIC_SHARED(memory);
    Tile<STRIP_PITCH> matrix{reinterpret_cast<bf16*>(memory)}, strip{matrix.place(CHUNK, 0)};
    Place place(chunks, heads);
    if (place.rows == 0) return;
    HeadRows<const f32> inverse = place.of_heads(solved, heads, CHUNK), strength = place.of_heads(beta, heads, 1);
    HeadRows<bf16> of_values = place.of_heads(values, heads, heads.value_dim), of_v = place.of_heads(dv, heads, heads.value_dim);
    for (i32 i = i32(threadIdx.x); i < CHUNK * CHUNK / 2; i += THREADS) {
        i32 row = i / (CHUNK / 2), j = i % (CHUNK / 2) * 2;
        set_pair(matrix.place(row, j), inverse.get(row, j), inverse.get(row, j + 1));
    }
    i32 own = warp_index() * WARP_ROWS;
    for (i32 skipped = 0; skipped < heads.value_dim; skipped += STRIP) {
        __syncthreads();  // the last strip's readers are done
        bring<CHUNK, STRIP>(strip, of_values, skipped);
        arrive();
        Sums<STRIP / 8> sums;
        sums.clear();
        for (i32 depth = own; depth < CHUNK; depth += 16) {  // nothing beyond the diagonal
            u32 a[4];
            matrix.left_turned(a, own, depth);
            sums.add_columns(a, strip, depth);
        }
        store(sums, of_values, own, skipped);
        sums.each([&](i32 row, i32, f32& left, f32& right) {
            f32 factor = strength.get(own + row, 0);
            left *= factor, right *= factor;
        });
        store(sums, of_v, own, skipped);
    }
}

ENTRY(THREADS, 4)
delta_factors_bf16(const bf16* __restrict__ k, const bf16* __restrict__ v, const f32* __restrict__ decay,
                   const f32* __restrict__ beta, const f32* __restrict__ solved, const i32* __restrict__ chunks,
                   bf16* __restrict__ w, bf16* __restrict__ values, f32* __restrict__ fades, i32 key_heads, i32 value_heads,
                   i32 key_dim, i32 value_dim) {
    factors(k, v, decay, beta, solved, chunks, w, values, fades, Heads{key_heads, value_heads, key_dim, value_dim});
}
ENTRY(THREADS, 4)
delta_residuals_bf16(const f32* __restrict__ beta, const f32* __restrict__ solved, const i32* __restrict__ chunks,
                     bf16* __restrict__ values, bf16* __restrict__ dv, i32 key_heads, i32 value_heads, i32 key_dim,
                     i32 value_dim) {
    residuals(beta, solved, chunks, values, dv, Heads{key_heads, value_heads, key_dim, value_dim});
}

// Of keys of up to so many elements.
#define CARRY(KEY)                                                                                                           \
    ENTRY(THREADS, 3)                                                                                                        \
    delta_pulls_keys##KEY##_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k, const f32* __restrict__ decay,      \
                                 const f32* __restrict__ beta, const bf16* __restrict__ dout,                                \
                                 const i32* __restrict__ chunks, bf16* __restrict__ values, bf16* __restrict__ dstates,      \
                                 i32 key_heads, i32 value_heads, i32 key_dim, i32 value_dim, f32 scale) {                    \
        pulls<KEY>(q, k, decay, beta, dout, chunks, values, dstates, Heads{key_heads, value_heads, key_dim, value_dim},      \
                   scale);                                                                                                   \
    }                                                                                                                        \
    ENTRY(THREADS, 2)                                                                                                        \
    delta_carry_forward_keys##KEY##_bf16(const bf16* __restrict__ k, const bf16* __restrict__ w,                             \
                                         const f32* __restrict__ fades, const i32* __restrict__ documents,                   \
                                         f32* __restrict__ state, bf16* __restrict__ values, bf16* __restrict__ states,      \
                                         i32 key_heads, i32 value_heads, i32 key_dim, i32 value_dim) {                       \
        carry<false, KEY>(k, w, fades, documents, state, values, states,                                                     \
                          Heads{key_heads, value_heads, key_dim, value_dim});                                                \
    }                                                                                                                        \
    ENTRY(THREADS, 2)                                                                                                        \
    delta_carry_back_keys##KEY##_bf16(const bf16* __restrict__ k, const bf16* __restrict__ w,                                \
                                      const f32* __restrict__ fades, const i32* __restrict__ documents,                      \
                                      bf16* __restrict__ values, bf16* __restrict__ dstates, i32 key_heads,                  \
                                      i32 value_heads, i32 key_dim, i32 value_dim) {                                         \
        carry<true, KEY>(k, w, fades, documents, nullptr, values, dstates,                                                   \
                         Heads{key_heads, value_heads, key_dim, value_dim});                                                 \
    }                                                                                                                        \
    ENTRY(THREADS, 3)                                                                                                        \
    delta_outputs_keys##KEY##_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k,                                   \
                                   const bf16* __restrict__ values, const bf16* __restrict__ states,                         \
                                   const f32* __restrict__ decay, const f32* __restrict__ beta,                              \
                                   const i32* __restrict__ chunks, bf16* __restrict__ out, i32 key_heads, i32 value_heads,   \
                                   i32 key_dim, i32 value_dim, f32 scale) {                                                  \
        outputs<KEY>(q, k, values, states, decay, beta, chunks, out, Heads{key_heads, value_heads, key_dim, value_dim},      \
                     scale);                                                                                                 \
    }
CARRY(64)
CARRY(128)
