// The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464) in chunks of 64 tokens (WY form, arXiv 2406.06484).
//
// For each document and value head, with state S [Dk, Dv] from zero, c_i the decay cumulated within the chunk, and
// b_ij = e^{c_i − c_j}:
//
//   L_ij = β_i (k_i · k_j) b_ij, j < i     A = (I + L)⁻¹        delta_solve       saved for the backward pass
//   P_ij = (q_i · k_j) b_ij, j ≤ i                              delta_products
//   r_i  = β_i (v_i − e^{c_i} k_i S)       u = A r              delta_scan
//   o_i  = scale (e^{c_i} q_i S + Σ_j P_ij u_j)
//   S'   = e^{c_n} S + Σ_i e^{c_n − c_i} k_iᵀ u_i
//
// Backward, with E = dS' and d = scale · do; S and u are computed again by a scan that keeps them:
//
//   du   = e^{c_n − c_i} k_i E + Pᵀ d      dr = Aᵀ du           delta_reverse, from the last chunk to the first
//   dv   = β dr
//   dS   = e^{c_n} E + Σ_i e^{c_i} (q_iᵀ d_i − β_i k_iᵀ dr_i)
//
//   X_ij = (d_i · u_j) b_ij                Y_ij = (dr_i · u_j) b_ij, j < i        delta_gradients
//   dq_i = e^{c_i} d_i Sᵀ + Σ_{j ≤ i} X_ij k_j
//   f_i  = e^{c_i} dr_i Sᵀ + Σ_{j < i} Y_ij k_j
//   h_j  = e^{c_n − c_j} u_j Eᵀ + Σ_{i ≥ j} X_ij q_i − Σ_{i > j} β_i Y_ij k_i
//   dk_i = h_i − β_i f_i                   dβ_i = dr_i · v_i − k_i · f_i
//   dc_i = q_i · dq_i − β_i k_i · f_i − k_i · h_i                without the terms j = i, which cancel
//   dc_n += Σ_i e^{c_n − c_i} k_i · (u_i Eᵀ) + e^{c_n} ⟨S, E⟩      dg_i = Σ_{j ≥ i} dc_j
//
// Tensors: q, k [T, Hk, Dk] and v, o [T, Hv, Dv] activations; g, β f32 [T, Hv]; A f32 [T, Hv, 64]; the state f32
// [documents, Hv, Dk, Dv]. Scratch in the activations' type: P [T, Hv, 64]; backward also u and dr [T, Hv, Dv], S and E
// [chunks, Hv, Dk, Dv]. Head h of Hv reads head h · Hk / Hv of q and k. `chunks` i32 [chunks, 2] is the first row and the rows of
// every chunk; `documents` i32 [documents, 3] first row, last row + 1 and first chunk of every document.
//
// Work, for D = Dk = Dv: forward 2 · 64 · D (two scores) + 3 D² + 2 · 64 · D multiply-adds a token and value head, backward about
// three times that. Bytes: inputs and outputs once for every column block, P and A once.
//
// Decomposition. delta_solve and delta_products: a block a chunk and head. The scans are sequential in chunks, but columns of S
// do not know of each other: a block has a document, a head and 32 columns, and S stays in its shared memory in f32.
// delta_gradients: a block a chunk and key head, over the heads of its group one after the other, so dq and dk are summed in
// registers and no atomics are needed. All products are `Product` (product.cuh): factors in the activations' type (bf16: tensor
// cores), sums in f32. These scans take heads of any size and f32; bf16 with regular heads has the short scans of
// `delta_carry.cu`, between the same delta_solve and delta_gradients.
//
// A by blocks: the inverses of the four 16 × 16 blocks of the diagonal by substitution, a thread a column; then twice the size by
// −A₂₂ (L₂₁ A₁₁), twice.
//
// Numerics: c is summed in f64 and kept as two f32, so differences of neighbours stay exact however far the decay has gone; every
// difference is taken before its exponential, whose argument is never positive, so nothing overflows. S, E, A and all sums are
// f32. Sums have a fixed order: the same bits every time, and the same for a document alone and among others.

#include "delta.cuh"

constexpr i32 THREADS = 256;
static_assert(THREADS == PRODUCT_THREADS, "a block's threads are those of its products");
// Columns of the state of a block of the scans, and the length of their rows in shared memory.
constexpr i32 COLUMNS = 32;
constexpr i32 COLUMN_ROW = COLUMNS + 1;
constexpr i32 SQUARE_ROW = CHUNK + 1;
constexpr i32 SQUARE = CHUNK * SQUARE_ROW;

// ---- the chunk's matrices ------------------------------------------------------------------------------------------

template <class A>
DEVICE void delta_products(const A* q, const A* k, const f32* decay, const f32* beta, const i32* chunks, A* products,
                           Heads heads) {
    DYNAMIC_SHARED(memory);
    f32* stage = reinterpret_cast<f32*>(memory);
    Gates gates(stage + PRODUCT_STAGE<CHUNK>);
    i32 head = i32(blockIdx.y), first = chunks[2 * blockIdx.x], rows = chunks[2 * blockIdx.x + 1];
    if (rows == 0) return;  // a place for documents of another batch
    gates.load(decay, beta, first, rows, heads.value_heads, head);
    HeadRows<const A> query(q, first, rows, heads.key_heads, heads.key_head(head), heads.key_dim);
    HeadRows<const A> key(k, first, rows, heads.key_heads, heads.key_head(head), heads.key_dim);
    Product<A, CHUNK> scores;
    scores.clear();
    scores.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.key_dim, query, key);
    HeadRows<A> out(products, first, rows, heads.value_heads, head, CHUNK);
    scores.each([&](i32 i, i32 j, f32 value) {
        out.set(i, j, from_f32<A>(j <= i ? value * gates.between(i, j) : 0.0f));
    });
}

// Both are [64][65]: `inverse` becomes (I + lower)⁻¹; `lower` has nothing but what lies below the diagonal, `scratch` has room for
// 32 × 33.
DEVICE void invert(const f32* lower, f32* inverse, f32* scratch) {
    i32 thread = i32(threadIdx.x);
    for (i32 i = thread; i < SQUARE; i += THREADS) inverse[i] = 0.0f;
    __syncthreads();
    if (thread < CHUNK) {
        i32 base = thread / 16 * 16;
        inverse[thread * SQUARE_ROW + thread] = 1.0f;
        for (i32 i = thread + 1; i < base + 16; i++) {
            f32 sum = 0.0f;
            for (i32 j = thread; j < i; j++) sum += lower[i * SQUARE_ROW + j] * inverse[j * SQUARE_ROW + thread];
            inverse[i * SQUARE_ROW + thread] = -sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (i32 size = 16; size < CHUNK; size *= 2) {
        i32 elements = CHUNK / 2 * size;  // of all blocks of this size below the diagonal
        for (i32 e = thread; e < elements; e += THREADS) {
            i32 pair = e / (size * size), i = e / size % size, j = e % size, corner = 2 * size * pair;
            f32 sum = 0.0f;
            for (i32 m = j; m < size; m++)
                sum += lower[(corner + size + i) * SQUARE_ROW + corner + m] * inverse[(corner + m) * SQUARE_ROW + corner + j];
            scratch[e] = sum;
        }
        __syncthreads();
        for (i32 e = thread; e < elements; e += THREADS) {
            i32 pair = e / (size * size), i = e / size % size, j = e % size, corner = 2 * size * pair + size;
            f32 sum = 0.0f;
            for (i32 m = 0; m <= i; m++)
                sum += inverse[(corner + i) * SQUARE_ROW + corner + m] * scratch[(pair * size + m) * size + j];
            inverse[(corner + i) * SQUARE_ROW + corner - size + j] = -sum;
        }
        __syncthreads();
    }
}

template <class A>
DEVICE void delta_solve(const A* k, const f32* decay, const f32* beta, const i32* chunks, f32* solved, Heads heads) {
    DYNAMIC_SHARED(memory);
    f32* stage = reinterpret_cast<f32*>(memory);
    f32* lower = stage + PRODUCT_STAGE<CHUNK>;
    f32* inverse = lower + SQUARE;
    Gates gates(inverse + SQUARE);
    i32 head = i32(blockIdx.y), first = chunks[2 * blockIdx.x], rows = chunks[2 * blockIdx.x + 1];
    if (rows == 0) return;  // a place for documents of another batch
    gates.load(decay, beta, first, rows, heads.value_heads, head);
    HeadRows<const A> key(k, first, rows, heads.key_heads, heads.key_head(head), heads.key_dim);
    Product<A, CHUNK> scores;
    scores.clear();
    scores.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.key_dim, key, key);
    scores.each([&](i32 i, i32 j, f32 value) {
        lower[i * SQUARE_ROW + j] = j < i ? gates.beta[i] * value * gates.between(i, j) : 0.0f;
    });
    __syncthreads();
    invert(lower, inverse, stage);
    HeadRows<f32> out(solved, first, rows, heads.value_heads, head, CHUNK);
    for (i32 i = i32(threadIdx.x); i < CHUNK * CHUNK; i += THREADS)
        out.set(i / CHUNK, i % CHUNK, inverse[i / CHUNK * SQUARE_ROW + i % CHUNK]);
}

// ---- the scans -----------------------------------------------------------------------------------------------------

// What a block of the scans has: a document, a head, and columns of its state. A: the type of its products' factors.
template <class A>
struct Scan {
    static constexpr i32 STAGE = PRODUCT_STAGE_OF<A, COLUMNS>;
    i32 head, column, start, end, chunk;
    f32 *stage, *state, *values;

    DEVICE Scan(f32* memory, const i32* documents, Heads heads)
        : head(i32(blockIdx.y)), column(i32(blockIdx.z) * COLUMNS), start(documents[3 * blockIdx.x]),
          end(documents[3 * blockIdx.x + 1]), chunk(documents[3 * blockIdx.x + 2]), stage(memory),
          state(stage + STAGE + Gates::FLOATS), values(state + heads.key_dim * COLUMN_ROW) {}

    DEVICE f32* gates() const { return stage + STAGE; }

    // Calls `visit(row, column of the head, place in shared memory)` for every element of the state.
    template <class Visit>
    DEVICE void each_of_state(Heads heads, Visit visit) const {
        for (i32 i = i32(threadIdx.x); i < heads.key_dim * COLUMNS; i += THREADS) {
            i32 row = i / COLUMNS, j = i % COLUMNS;
            visit(row, column + j, row * COLUMN_ROW + j);
        }
    }
    // Begins with what is at `from` [Dk, Dv], or with zero.
    DEVICE void begin(Heads heads, const f32* from) const {
        each_of_state(heads, [&](i32 row, i32 j, i32 place) {
            bool inside = from != nullptr && j < heads.value_dim;
            state[place] = inside ? from[i64(row) * heads.value_dim + j] : 0.0f;
        });
    }
    // Stores the state at `to` [Dk, Dv].
    template <class T>
    DEVICE void keep(Heads heads, T* to) const {
        each_of_state(heads, [&](i32 row, i32 j, i32 place) {
            if (j < heads.value_dim) to[i64(row) * heads.value_dim + j] = from_f32<T>(state[place]);
        });
    }
};

// The forward pass, OUTPUT: out, and the last state where one is given. Otherwise the first half of the backward pass: the state
// before each chunk, and u.
template <bool OUTPUT, class A>
DEVICE void delta_scan(const A* q, const A* k, const A* v, const f32* decay, const f32* beta, const f32* solved,
                       const A* products, const i32* documents, f32* last_state, A* out, A* states, Heads heads, f32 scale) {
    DYNAMIC_SHARED(memory);
    Scan<A> scan(reinterpret_cast<f32*>(memory), documents, heads);
    Gates gates(scan.gates());
    i64 state_size = i64(heads.key_dim) * heads.value_dim;
    f32* own_state = last_state;
    if (own_state != nullptr) own_state += (i64(blockIdx.x) * heads.value_heads + scan.head) * state_size;
    scan.begin(heads, own_state);
    f32 *state = scan.state, *values = scan.values;
    i32 key_head = heads.key_head(scan.head);
    for (i32 first = scan.start, chunk = scan.chunk; first < scan.end; first += CHUNK, chunk++) {
        i32 rows = min(CHUNK, scan.end - first);
        gates.load(decay, beta, first, rows, heads.value_heads, scan.head);
        if constexpr (!OUTPUT) scan.keep(heads, states + (i64(chunk) * heads.value_heads + scan.head) * state_size);
        HeadRows<const A> of_key(k, first, rows, heads.key_heads, key_head, heads.key_dim);
        HeadRows<const A> of_value(v, first, rows, heads.value_heads, scan.head, heads.value_dim);
        HeadRows<const f32> inverse(solved, first, rows, heads.value_heads, scan.head, CHUNK);
        HeadRows<A> result(out, first, rows, heads.value_heads, scan.head, heads.value_dim);
        auto of_state = [&](i32 j, i32 d) { return state[d * COLUMN_ROW + j]; };
        auto of_values = [&](i32 j, i32 i) { return values[i * COLUMN_ROW + j]; };

        Product<A, COLUMNS> tile;
        tile.clear();
        tile.template add<ALONG_DEPTH, ACROSS>(scan.stage, heads.key_dim, of_key, of_state);
        tile.each([&](i32 i, i32 j, f32 known) {
            values[i * COLUMN_ROW + j] = gates.beta[i] * (of_value.get(i, scan.column + j) - gates.from_start[i] * known);
        });
        tile.clear();
        tile.template add<ALONG_DEPTH, ACROSS>(scan.stage, rows, inverse, of_values);
        tile.each([&](i32 i, i32 j, f32 corrected) {
            values[i * COLUMN_ROW + j] = corrected;
            if constexpr (!OUTPUT) result.set(i, scan.column + j, from_f32<A>(corrected));
        });
        if constexpr (OUTPUT) {
            HeadRows<const A> query(q, first, rows, heads.key_heads, key_head, heads.key_dim);
            HeadRows<const A> product(products, first, rows, heads.value_heads, scan.head, CHUNK);
            tile.clear();
            tile.template add<ALONG_DEPTH, ACROSS>(scan.stage, heads.key_dim, query, of_state);
            tile.each([&](i32 i, i32, f32& read) { read *= gates.from_start[i]; });
            tile.template add<ALONG_DEPTH, ACROSS>(scan.stage, rows, product, of_values);
            tile.each([&](i32 i, i32 j, f32 read) { result.set(i, scan.column + j, from_f32<A>(scale * read)); });
        }
        if (first + CHUNK >= scan.end && own_state == nullptr) return;
        f32 whole = gates.from_start[rows - 1];
        for (i32 block = 0; block < heads.key_dim; block += CHUNK) {
            auto inside = [&](i32 i) { return block + i < heads.key_dim; };
            tile.each([&](i32 i, i32 j, f32& sum) { sum = inside(i) ? whole * state[(block + i) * COLUMN_ROW + j] : 0.0f; });
            tile.template add<ACROSS, ACROSS>(
                scan.stage, rows, [&](i32 d, i32 i) { return gates.to_end[i] * of_key.get(i, block + d); }, of_values);
            tile.each([&](i32 i, i32 j, f32 sum) {
                if (inside(i)) state[(block + i) * COLUMN_ROW + j] = sum;
            });
        }
    }
    __syncthreads();
    if (own_state != nullptr) scan.keep(heads, own_state);
}

template <class A>
DEVICE void delta_reverse(const A* q, const A* k, const f32* decay, const f32* beta, const f32* solved, const A* products,
                          const A* dout, const i32* documents, A* dstates, A* dresidual, A* dv, Heads heads, f32 scale) {
    DYNAMIC_SHARED(memory);
    Scan<A> scan(reinterpret_cast<f32*>(memory), documents, heads);
    Gates gates(scan.gates());
    i64 state_size = i64(heads.key_dim) * heads.value_dim;
    scan.begin(heads, nullptr);
    f32 *state = scan.state, *values = scan.values;  // E, and du, later β dr
    i32 key_head = heads.key_head(scan.head);
    i32 steps = (scan.end - scan.start + CHUNK - 1) / CHUNK;
    for (i32 step = steps - 1; step >= 0; step--) {
        i32 first = scan.start + step * CHUNK, rows = min(CHUNK, scan.end - first);
        gates.load(decay, beta, first, rows, heads.value_heads, scan.head);
        scan.keep(heads, dstates + (i64(scan.chunk + step) * heads.value_heads + scan.head) * state_size);
        HeadRows<const A> of_key(k, first, rows, heads.key_heads, key_head, heads.key_dim);
        HeadRows<const A> of_query(q, first, rows, heads.key_heads, key_head, heads.key_dim);
        HeadRows<const A> of_dout(dout, first, rows, heads.value_heads, scan.head, heads.value_dim);
        HeadRows<const f32> of_inverse(solved, first, rows, heads.value_heads, scan.head, CHUNK);
        HeadRows<const A> of_product(products, first, rows, heads.value_heads, scan.head, CHUNK);
        HeadRows<A> through(dresidual, first, rows, heads.value_heads, scan.head, heads.value_dim);
        HeadRows<A> of_v(dv, first, rows, heads.value_heads, scan.head, heads.value_dim);
        auto of_gradient = [&](i32 j, i32 i) { return of_dout.get(i, scan.column + j); };
        auto of_values = [&](i32 j, i32 i) { return values[i * COLUMN_ROW + j]; };

        Product<A, COLUMNS> tile;
        tile.clear();
        tile.template add<ACROSS, ACROSS>(scan.stage, rows, [&](i32 j, i32 i) { return of_product.get(i, j); }, of_gradient);
        Product<A, COLUMNS> reached;
        reached.clear();
        reached.template add<ALONG_DEPTH, ACROSS>(scan.stage, heads.key_dim, of_key,
                                                  [&](i32 j, i32 d) { return state[d * COLUMN_ROW + j]; });
        reached.each([&](i32 i, i32, f32& value) { value *= gates.to_end[i]; });
        reached.add_scaled(tile, scale);
        reached.each([&](i32 i, i32 j, f32 value) { values[i * COLUMN_ROW + j] = value; });
        tile.clear();
        tile.template add<ACROSS, ACROSS>(scan.stage, rows, [&](i32 j, i32 i) { return of_inverse.get(i, j); }, of_values);
        tile.each([&](i32 i, i32 j, f32 value) {
            through.set(i, scan.column + j, from_f32<A>(value));
            of_v.set(i, scan.column + j, from_f32<A>(gates.beta[i] * value));
            values[i * COLUMN_ROW + j] = gates.beta[i] * value;
        });
        if (step == 0) return;
        f32 whole = gates.from_start[rows - 1];
        for (i32 block = 0; block < heads.key_dim; block += CHUNK) {
            auto inside = [&](i32 i) { return block + i < heads.key_dim; };
            tile.each([&](i32 i, i32 j, f32& sum) { sum = inside(i) ? whole * state[(block + i) * COLUMN_ROW + j] : 0.0f; });
            tile.template add<ACROSS, ACROSS>(
                scan.stage, rows, [&](i32 d, i32 i) { return scale * gates.from_start[i] * of_query.get(i, block + d); },
                of_gradient);
            tile.template add<ACROSS, ACROSS>(
                scan.stage, rows, [&](i32 d, i32 i) { return -gates.from_start[i] * of_key.get(i, block + d); }, of_values);
            tile.each([&](i32 i, i32 j, f32 sum) {
                if (inside(i)) state[(block + i) * COLUMN_ROW + j] = sum;
            });
        }
    }
}

// ---- gradients of a chunk ------------------------------------------------------------------------------------------

// Calls `take(i, Σ_j tile_ij · other(i, j))` once for every row, by one thread each. `square` is free before and behind.
template <class A, class Other, class Take>
DEVICE void row_dots(Product<A, CHUNK>& tile, f32* square, Other other, Take take) {
    __syncthreads();
    tile.each([&](i32 i, i32 j, f32 value) { square[i * SQUARE_ROW + j] = value * other(i, j); });
    __syncthreads();
    i32 row = i32(threadIdx.x) / 4, part = i32(threadIdx.x) % 4 * 16;
    f32 sum = 0.0f;
#pragma unroll
    for (i32 j = 0; j < 16; j++) sum += square[row * SQUARE_ROW + part + j];
    sum = lanes_sum<4>(sum);
    if (part == 0) take(row, sum);
    __syncthreads();
}

template <class A>
DEVICE void delta_gradients(const A* q, const A* k, const A* v, const f32* decay, const f32* beta, const A* states,
                            const A* dstates, const A* corrected, const A* dresidual, const A* dout, const i32* chunks, A* dq,
                            A* dk, f32* ddecay, f32* dbeta, Heads heads, f32 scale) {
    DYNAMIC_SHARED(memory);
    i32 group = heads.value_heads / heads.key_heads, key_head = i32(blockIdx.y);
    f32* stage = reinterpret_cast<f32*>(memory);
    f32* square_x = stage + PRODUCT_STAGE<CHUNK>;
    f32* square_y = square_x + SQUARE;
    f32* diagonal = square_y + SQUARE;
    f32* pulls = diagonal + CHUNK;
    Gates gates(pulls + CHUNK);
    f32* dc = pulls + CHUNK + Gates::FLOATS;  // [group][64]
    f32* db = dc + group * CHUNK;             // [group][64]
    i32 first = chunks[2 * blockIdx.x], rows = chunks[2 * blockIdx.x + 1];
    if (rows == 0) return;  // a place for documents of another batch
    i64 state_size = i64(heads.key_dim) * heads.value_dim;
    for (i32 i = i32(threadIdx.x); i < 2 * group * CHUNK; i += THREADS) dc[i] = 0.0f;
    HeadRows<const A> query(q, first, rows, heads.key_heads, key_head, heads.key_dim);
    HeadRows<const A> key(k, first, rows, heads.key_heads, key_head, heads.key_dim);

    for (i32 block = 0; block < heads.key_dim; block += CHUNK) {
        Product<A, CHUNK> sum_q, sum_k;
        sum_q.clear(), sum_k.clear();
        for (i32 member = 0; member < group; member++) {
            i32 head = key_head * group + member;
            gates.load(decay, beta, first, rows, heads.value_heads, head);
            HeadRows<const A> gradient(dout, first, rows, heads.value_heads, head, heads.value_dim);
            HeadRows<const A> through(dresidual, first, rows, heads.value_heads, head, heads.value_dim);
            HeadRows<const A> values(corrected, first, rows, heads.value_heads, head, heads.value_dim);
            i64 place = (i64(blockIdx.x) * heads.value_heads + head) * state_size;
            place += i64(block) * heads.value_dim;
            HeadRows<const A> of_state(states + place, 0, heads.key_dim - block, 1, 0, heads.value_dim);
            HeadRows<const A> of_dstate(dstates + place, 0, heads.key_dim - block, 1, 0, heads.value_dim);
            auto of_query = [&](i32 i, i32 d) { return query.get(i, block + d); };
            auto of_key = [&](i32 i, i32 d) { return key.get(i, block + d); };
            auto query_column = [&](i32 d, i32 i) { return of_query(i, d); };
            auto key_column = [&](i32 d, i32 i) { return of_key(i, d); };
            f32 *own_dc = dc + member * CHUNK, *own_db = db + member * CHUNK;

            Product<A, CHUNK> tile;
            tile.clear();
            tile.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.value_dim, gradient, values);
            tile.each([&](i32 i, i32 j, f32 value) {
                square_x[i * SQUARE_ROW + j] = j < i && i < rows ? scale * value * gates.between(i, j) : 0.0f;
                if (i == j) diagonal[i] = scale * value;
            });
            tile.clear();
            tile.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.value_dim, through, values);
            tile.each([&](i32 i, i32 j, f32 value) {
                square_y[i * SQUARE_ROW + j] = j < i && i < rows ? value * gates.between(i, j) : 0.0f;
            });

            // dq without the diagonal's part.
            tile.clear();
            tile.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.value_dim, gradient, of_state);
            tile.each([&](i32 i, i32, f32& value) { value *= scale * gates.from_start[i]; });
            tile.template add<ALONG_DEPTH, ACROSS>(
                stage, rows, [&](i32 i, i32 j) { return square_x[i * SQUARE_ROW + j]; }, key_column);
            row_dots(tile, stage, of_query, [&](i32 i, f32 dot) { own_dc[i] += dot; });
            sum_q.add_scaled(tile, 1.0f);
            sum_q.each([&](i32 i, i32 d, f32& sum) { sum += diagonal[i] * of_key(i, d); });

            // f.
            tile.clear();
            tile.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.value_dim, through, of_state);
            tile.each([&](i32 i, i32, f32& value) { value *= gates.from_start[i]; });
            tile.template add<ALONG_DEPTH, ACROSS>(
                stage, rows, [&](i32 i, i32 j) { return square_y[i * SQUARE_ROW + j]; }, key_column);
            row_dots(tile, stage, of_key, [&](i32 i, f32 dot) { own_db[i] -= dot, own_dc[i] -= gates.beta[i] * dot; });
            tile.each([&](i32 i, i32, f32& value) { value *= gates.beta[i]; });
            sum_k.add_scaled(tile, -1.0f);

            // h without the diagonal's part.
            tile.clear();
            tile.template add<ALONG_DEPTH, ALONG_DEPTH>(stage, heads.value_dim, values, of_dstate);
            tile.each([&](i32 i, i32, f32& value) { value *= gates.to_end[i]; });
            row_dots(tile, stage, of_key, [&](i32 i, f32 dot) { pulls[i] = dot; });
            tile.template add<ACROSS, ACROSS>(
                stage, rows, [&](i32 j, i32 i) { return square_x[i * SQUARE_ROW + j]; }, query_column);
            tile.template add<ACROSS, ACROSS>(
                stage, rows, [&](i32 j, i32 i) { return -gates.beta[i] * square_y[i * SQUARE_ROW + j]; }, key_column);
            row_dots(tile, stage, of_key, [&](i32 i, f32 dot) { own_dc[i] -= dot; });
            sum_k.add_scaled(tile, 1.0f);
            sum_k.each([&](i32 i, i32 d, f32& sum) { sum += diagonal[i] * of_query(i, d); });
            if (threadIdx.x == 0) {
                f32 sum = 0.0f;
                for (i32 i = 0; i < rows; i++) sum += pulls[i];
                own_dc[rows - 1] += sum;
            }
        }
        HeadRows<A> of_dq(dq, first, rows, heads.key_heads, key_head, heads.key_dim);
        HeadRows<A> of_dk(dk, first, rows, heads.key_heads, key_head, heads.key_dim);
        sum_q.each([&](i32 i, i32 d, f32 sum) { of_dq.set(i, block + d, from_f32<A>(sum)); });
        sum_k.each([&](i32 i, i32 d, f32 sum) { of_dk.set(i, block + d, from_f32<A>(sum)); });
    }

    for (i32 member = 0; member < group; member++) {
        i32 head = key_head * group + member;
        gates.load(decay, beta, first, rows, heads.value_heads, head);
        f32 *own_dc = dc + member * CHUNK, *own_db = db + member * CHUNK;
        HeadRows<const A> through(dresidual, first, rows, heads.value_heads, head, heads.value_dim);
        HeadRows<const A> value(v, first, rows, heads.value_heads, head, heads.value_dim);
        i32 row = i32(threadIdx.x) / 4, part = i32(threadIdx.x) % 4;
        f32 dot = 0.0f;
        for (i32 e = part; e < heads.value_dim; e += 4) dot += through.get(row, e) * value.get(row, e);
        dot = lanes_sum<4>(dot);
        if (part == 0 && row < rows) dbeta[(i64(first) + row) * heads.value_heads + head] = own_db[row] + dot;
        i64 place = (i64(blockIdx.x) * heads.value_heads + head) * state_size;
        f32 both = 0.0f;
        for (i64 i = threadIdx.x; i < state_size; i += THREADS) both += to_f32(states[place + i]) * to_f32(dstates[place + i]);
        both = block_sum<THREADS>(both) * gates.from_start[rows - 1];
        i32 i = i32(threadIdx.x);
        if (i < rows) {
            f64 sum = f64(both);
            for (i32 j = rows - 1; j >= i; j--) sum += f64(own_dc[j]);
            ddecay[(i64(first) + i) * heads.value_heads + head] = f32(sum);
        }
    }
}

#define GATED_DELTA(A)                                                                                                       \
    ENTRY(THREADS, 2)                                                                                                        \
    delta_products_##A(const A* __restrict__ q, const A* __restrict__ k, const f32* __restrict__ decay,                      \
                       const f32* __restrict__ beta, const i32* __restrict__ chunks, A* __restrict__ products,               \
                       i32 key_heads, i32 value_heads, i32 key_dim, i32 value_dim) {                                         \
        delta_products<A>(q, k, decay, beta, chunks, products, Heads{key_heads, value_heads, key_dim, value_dim});           \
    }                                                                                                                        \
    ENTRY(THREADS, 2)                                                                                                        \
    delta_solve_##A(const A* __restrict__ k, const f32* __restrict__ decay, const f32* __restrict__ beta,                    \
                    const i32* __restrict__ chunks, f32* __restrict__ solved, i32 key_heads, i32 value_heads, i32 key_dim,   \
                    i32 value_dim) {                                                                                         \
        delta_solve<A>(k, decay, beta, chunks, solved, Heads{key_heads, value_heads, key_dim, value_dim});                   \
    }                                                                                                                        \
    ENTRY(THREADS, 1)                                                                                                        \
    delta_gradients_##A(const A* __restrict__ q, const A* __restrict__ k, const A* __restrict__ v,                           \
                        const f32* __restrict__ decay, const f32* __restrict__ beta, const A* __restrict__ states,           \
                        const A* __restrict__ dstates, const A* __restrict__ corrected, const A* __restrict__ dresidual,     \
                        const A* __restrict__ dout, const i32* __restrict__ chunks, A* __restrict__ dq, A* __restrict__ dk,  \
                        f32* __restrict__ ddecay, f32* __restrict__ dbeta, i32 key_heads, i32 value_heads, i32 key_dim,      \
                        i32 value_dim, f32 scale) {                                                                          \
        delta_gradients<A>(q, k, v, decay, beta, states, dstates, corrected, dresidual, dout, chunks, dq, dk, ddecay, dbeta, \
                           Heads{key_heads, value_heads, key_dim, value_dim}, scale);                                        \
    }
GATED_DELTA(f32)
GATED_DELTA(bf16)

#define SCANS(A)                                                                                                              \
    ENTRY(THREADS, 1)                                                                                                        \
    delta_forward_##A(const A* __restrict__ q, const A* __restrict__ k, const A* __restrict__ v,                             \
                      const f32* __restrict__ decay, const f32* __restrict__ beta, const f32* __restrict__ solved,           \
                      const A* __restrict__ products, const i32* __restrict__ documents, f32* __restrict__ state,            \
                      A* __restrict__ out, i32 key_heads, i32 value_heads, i32 key_dim, i32 value_dim, f32 scale) {          \
        delta_scan<true, A>(q, k, v, decay, beta, solved, products, documents, state, out, nullptr,                          \
                            Heads{key_heads, value_heads, key_dim, value_dim}, scale);                                       \
    }                                                                                                                        \
    ENTRY(THREADS, 1)                                                                                                        \
    delta_states_##A(const A* __restrict__ k, const A* __restrict__ v, const f32* __restrict__ decay,                        \
                     const f32* __restrict__ beta, const f32* __restrict__ solved, const i32* __restrict__ documents,        \
                     A* __restrict__ states, A* __restrict__ corrected, i32 key_heads, i32 value_heads, i32 key_dim,         \
                     i32 value_dim) {                                                                                        \
        delta_scan<false, A>(nullptr, k, v, decay, beta, solved, nullptr, documents, nullptr, corrected, states,             \
                             Heads{key_heads, value_heads, key_dim, value_dim}, 1.0f);                                       \
    }                                                                                                                        \
    ENTRY(THREADS, 1)                                                                                                        \
    delta_reverse_##A(const A* __restrict__ q, const A* __restrict__ k, const f32* __restrict__ decay,                       \
                      const f32* __restrict__ beta, const f32* __restrict__ solved, const A* __restrict__ products,          \
                      const A* __restrict__ dout, const i32* __restrict__ documents, A* __restrict__ dstates,                \
                      A* __restrict__ dresidual, A* __restrict__ dv, i32 key_heads, i32 value_heads, i32 key_dim,            \
                      i32 value_dim, f32 scale) {                                                                            \
        delta_reverse<A>(q, k, decay, beta, solved, products, dout, documents, dstates, dresidual, dv,                       \
                         Heads{key_heads, value_heads, key_dim, value_dim}, scale);                                          \
    }
SCANS(f32)
SCANS(bf16)
