// Layers of routed experts on tensor cores: each expert's own matrix and adapter, for its own rows.
//
//   grouped_rows      out_m = left_m W_eᵀ + left2_m right2_eᵀ          y  = x W_eᵀ + (s u) B_eᵀ,  u = x A_eᵀ
//   grouped_columns   out_m = left_m W_e + left2_m right2_e            dx = dy W_e + v A_e,       v = s dy B_e
//   grouped_outer     gradient_e += scale · Σ_m left_mᵀ right_m        dA = vᵀ x,  dBᵀ = s uᵀ dy; straight or transposed
//   grouped_swiglu    gate_m = left_m G_eᵀ + left2_m R_eᵀ, up_m likewise,  y_m = w_m silu(gate_m) up_m
//   grouped_pair      out_m = a_m A_e + b_m B_e + left2_m right2_e     drows = dgate G + dup U + v A,  v = s (dgate B_g + dup B_u)
//   grouped_tiles     which expert and rows each block of the others has
//   decode_stack      every expert's matrix in bf16, for matrices whose rows are no multiples of 32 elements
//
// for every grouped row m of expert e. Tensors: left by token [T, K] or grouped [M, K] bf16; left2 [M, R] bf16 in grouped order;
// W [E, N, K] or [E, K, N] bf16 or NF4 codes; right2 [E, N, R] or [E, R, N] bf16; out f32 or bf16 [M, N], replaced or added to;
// `copy` gets bf16(copy_scale · out); either may be left out. offsets i32 [E + 1], slots i32 [M] as moe.cu's `group` writes them.
//
// Bytes: W of the experts that have rows once (0.5 byte an element in NF4), left and out once a slot. Below about 200 rows an
// expert on an H200 (bf16) or 60 (NF4) limited by memory.
//
// grouped_swiglu's R is [E, 2 F, R], the gate's rows over up's. Gate and up, or y, may be left out: a forward pass that keeps
// nothing writes y alone, 2 F bytes a slot at bf16 where two products and an activation move 10 F; one that prepares a backward
// pass writes gate and up alone. grouped_pair writes a slot's row of dx once, where two products write, read and write it.
//
// Decomposition: tiles as in tile.cuh. grouped_swiglu's tile is 64 columns of gate beside the same 64 of up; grouped_pair's depth
// is that of both products, one after the other. y and dx: 64 × 128, four warps: an expert of few rows wastes at most 63 of them; u and v,
// as narrow as the rank, 32 × 64. A block has rows of one expert only; experts without rows have no block, and rows are gathered
// by the copies to shared memory, so no grouped copy of x exists. Blocks that share an expert's columns follow each other.
// The outer products: a block has 32 × 64 elements of one expert's gradient and goes through that expert's rows in their order, so
// sums need neither atomics nor parts.
//
// Numerics: as matmul.cu. The second term's left factor, s u or v, is rounded to bf16.

#include "tile.cuh"
#include "grouped.cuh"

// Launched by these names; gpu/moe/tensor.rs has the same numbers.
using Wide = Tile<64, 128, 2, 2, 3>;
using Narrow = Tile<32, 64, 1, 4, 4>;

constexpr i32 THREADS = 256;

// One block. Experts' tiles follow each other, an expert's in the order of its rows; the rest of `tiles` says −1.
ENTRY(THREADS)
grouped_tiles(const i32* __restrict__ offsets, i32* __restrict__ tiles, i32 experts, i32 height, i32 count) {
    SHARED(i32, total, 1);
    if (warp_index() == 0) {
        i32 each = (experts + WARP_LANES - 1) / WARP_LANES;
        i32 begin = min(lane_index() * each, experts), end = min(begin + each, experts);
        auto of = [&](i32 e) { return (offsets[e + 1] - offsets[e] + height - 1) / height; };
        i32 own = 0;
        for (i32 e = begin; e < end; e++) own += of(e);
        i32 through = warp_sum_through(own);
        i32 tile = through - own;
        for (i32 e = begin; e < end; e++) {
            for (i32 i = 0; i < of(e); i++, tile++) {
                if (tile >= count) continue;  // of no routing that `route` wrote
                tiles[2 * tile] = e;
                tiles[2 * tile + 1] = offsets[e] + i * height;
            }
        }
        if (lane_index() == WARP_LANES - 1) total[0] = through;
    }
    __syncthreads();
    for (i32 tile = total[0] + i32(threadIdx.x); tile < count; tile += THREADS) tiles[2 * tile] = -1, tiles[2 * tile + 1] = 0;
}

// What is done with a finished tile of grouped rows.
template <class OUT>
struct GroupEpilogue {
    OUT* out;
    bf16* copy;
    f32 copy_scale;
    i32 accumulate;
    Group group;
    i64 columns;

    DEVICE void operator()(i32 row, i64 column, Pack pack) const {
        if (group.first + row >= group.end || column >= columns) return;
        bool aligned = columns % PACK == 0;
        i64 at = i64(group.first + row) * columns;
        if (accumulate) {
            Pack old = load_pack(out + at, column, columns, aligned);
#pragma unroll
            for (i32 i = 0; i < PACK; i++) pack.at[i] += old.at[i];
        }
        if (out != nullptr) store_pack(out + at, column, columns, aligned, pack);
        if (copy == nullptr) return;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] *= copy_scale;
        store_pack(copy + at, column, columns, aligned, pack);
    }
};

// One expert's matrix of `rows` × `width`; `table` has the sixteen values.
DEVICE DenseRight expert_factor(const bf16* weight, const StackScales&, const f32*, i32 expert, i64 rows, i64 width) {
    return {{weight + expert * rows * width, rows, width}};
}
DEVICE Nf4Right expert_factor(const u8* codes, const StackScales& scales, const f32* table, i32 expert, i64 rows, i64 width) {
    return {codes + expert * stored<u8>(rows * width), scales.of(expert), rows, width, 0, table};
}

// What of a weight's type needs a table: its values are there for all threads behind the next barrier.
template <class W>
DEVICE const f32* value_table() {
    if constexpr (sizeof(W) == 1) {
        SHARED(f32, table, 16);
        nf4_table(table);
        return table;
    } else {
        return nullptr;
    }
}

// Where the rows of a block's tile lie: those of its own group, and those of tokens, looked up once. Ends with a barrier.
template <class T>
struct Sources {
    const i32 *own, *gathered;

    DEVICE void find(const Group& group, const i32* slots, i32 top) {
        SHARED(i32, of_group, T::M);
        SHARED(i32, of_tokens, T::M);
        for (i32 i = i32(threadIdx.x); i < T::M; i += T::THREADS) {
            i32 row = group.first + i;
            of_group[i] = row < group.end ? row : -1;
            of_tokens[i] = row >= group.end ? -1 : slots == nullptr ? row : slots[row] / top;
        }
        __syncthreads();
        own = of_group, gathered = of_tokens;
    }
};

template <class T, bool COLUMNS, class W, class OUT>
DEVICE void grouped(const bf16* left, const i32* left_slots, const W* weight, const StackScales& scales, const bf16* left2,
                    const bf16* right2, const i32* tiles, const i32* offsets, GroupEpilogue<OUT> epilogue, i32 top, i32 depth,
                    i32 depth2) {
    DYNAMIC_SHARED(memory);
    Group group;
    if (!group.find(tiles, offsets, i32(blockIdx.x), T::M)) return;
    i64 n = i64(blockIdx.y) * T::N, columns = epilogue.columns;
    const f32* table = value_table<W>();
    Sources<T> rows;
    rows.find(group, left_slots, top);
    auto right = expert_factor(weight, scales, table, group.expert, COLUMNS ? depth : columns, COLUMNS ? columns : depth);
    auto right_low = expert_factor(right2, scales, table, group.expert, COLUMNS ? depth2 : columns, COLUMNS ? columns : depth2);
    Term<FoundRows, decltype(right)> terms[1] = {{FoundRows{left, rows.gathered, depth}, right, depth}};
    Term<FoundRows, DenseRight> low_rank{FoundRows{left2, rows.own, depth2}, right_low, depth2};
    Sums<T> sums;
    multiply_tile<T, false, COLUMNS>(sums, reinterpret_cast<bf16*>(memory), 0, n, terms, low_rank);
    epilogue.group = group;
    for_each_pack<T>(sums, memory, [&](i32 row, i32 column, const Pack& pack) { epilogue(row, n + column, pack); });
}

// Two terms with matrices of one shape, each with a left factor of its own in grouped order: out = a · A_e + b · B_e + low rank.
// In both stacks an expert's matrix begins `stack_rows` rows behind the last one's.
template <class T, class W, class OUT>
DEVICE void grouped_pair(const bf16* left_a, const bf16* left_b, const W* weight_a, const StackScales& scales_a,
                         const W* weight_b, const StackScales& scales_b, i64 stack_rows, const bf16* left2, const bf16* right2,
                         const i32* tiles, const i32* offsets, GroupEpilogue<OUT> epilogue, i32 depth, i32 depth2) {
    DYNAMIC_SHARED(memory);
    Group group;
    if (!group.find(tiles, offsets, i32(blockIdx.x), T::M)) return;
    i64 n = i64(blockIdx.y) * T::N, columns = epilogue.columns;
    const f32* table = value_table<W>();
    Sources<T> rows;
    rows.find(group, nullptr, 1);
    auto right_a = expert_factor(weight_a, scales_a, table, group.expert, stack_rows, columns);
    auto right_b = expert_factor(weight_b, scales_b, table, group.expert, stack_rows, columns);
    auto right_low = expert_factor(right2, scales_a, table, group.expert, depth2, columns);
    Term<FoundRows, decltype(right_a)> terms[2] = {{FoundRows{left_a, rows.own, depth}, right_a, depth},
                                                   {FoundRows{left_b, rows.own, depth}, right_b, depth}};
    Term<FoundRows, DenseRight> low_rank{FoundRows{left2, rows.own, depth2}, right_low, depth2};
    Sums<T> sums;
    multiply_tile<T, false, true>(sums, reinterpret_cast<bf16*>(memory), 0, n, terms, low_rank);
    epilogue.group = group;
    for_each_pack<T>(sums, memory, [&](i32 row, i32 column, const Pack& pack) { epilogue(row, n + column, pack); });
}

// Gate and up of half a tile's columns each.
template <class T, class W, class OUT>
DEVICE void grouped_swiglu(const bf16* left, const i32* slots, const W* gate, const StackScales& gate_scales, const W* up,
                           const StackScales& up_scales, const bf16* left2, const bf16* right2, const i32* tiles,
                           const i32* offsets, SwigluEpilogue<OUT> epilogue, i32 top, i32 depth, i32 depth2) {
    DYNAMIC_SHARED(memory);
    Group group;
    if (!group.find(tiles, offsets, i32(blockIdx.x), T::M)) return;
    i64 n = i64(blockIdx.y) * (T::N / 2), columns = epilogue.columns;
    const f32* table = value_table<W>();
    Sources<T> rows;
    rows.find(group, slots, top);
    auto of_gate = expert_factor(gate, gate_scales, table, group.expert, columns, depth);
    auto of_up = expert_factor(up, up_scales, table, group.expert, columns, depth);
    DenseRight both = expert_factor(right2, gate_scales, table, group.expert, 2 * columns, depth2);
    DenseRight low_gate{{both.matrix.values, columns, depth2}};
    using Both = PairRight<decltype(of_gate)>;
    Term<FoundRows, Both> terms[1] = {{FoundRows{left, rows.gathered, depth}, Both{{of_gate, of_up}}, depth}};
    Term<FoundRows, PairRight<DenseRight>> low_rank{FoundRows{left2, rows.own, depth2},
                                                    PairRight<DenseRight>{{low_gate, below(both, columns)}}, depth2};
    Sums<T> sums;
    multiply_tile<T, false, false>(sums, reinterpret_cast<bf16*>(memory), 0, n, terms, low_rank);
    epilogue.group = group;
    for_each_pair<T>(sums, memory, [&](i32 row, i32 column, const Pack& g, const Pack& u) { epilogue(row, n + column, g, u); });
}

// Rows of a group as a right factor.
struct GroupRight {
    GroupRows<bf16> matrix;

    template <class T, i32 N, bool COLUMNS>
    struct Feed {
        static_assert(COLUMNS, "the depth of an outer product is its rows");
        ::Feed<T, N, false, GroupRows<bf16>> feed;

        DEVICE void begin(const GroupRight& of, i64 first, i32 depth) { feed.begin(of.matrix, first, depth); }
        DEVICE void skip(i32 depth) { feed.skip(depth); }
        DEVICE void copy(SharedAddress tile) { feed.copy(tile); }
        DEVICE void fetch() {}
        DEVICE void advance() {}
        DEVICE void decode(SharedAddress, i32) const {}
    };
};

template <class T>
DEVICE void outer(const bf16* left, const bf16* right, const i32* right_slots, const i32* offsets, f32* gradient, i64 stride,
                  i32 top, i32 rows, i32 columns, f32 scale, i32 transposed) {
    DYNAMIC_SHARED(memory);
    Group group;
    if (!group.all(offsets, i32(blockIdx.z))) return;
    i64 m = i64(blockIdx.x) * T::M, n = i64(blockIdx.y) * T::N;
    gradient += group.expert * stride;
    i32 count = group.end - group.first;
    Rows of_left{left + i64(group.first) * rows, count, rows};
    GroupRight of_right{{right, right_slots, group, top, columns}};
    Sums<T> sums;
    multiply_tile<T, true, true>(sums, reinterpret_cast<bf16*>(memory), m, n, of_left, of_right, count);
    for_each_pack<T>(sums, memory, [&](i32 within, i32 first, const Pack& pack) {
        i64 row = m + within;
        if (row >= rows) return;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            i64 column = n + first + i;
            if (column < columns) gradient[transposed ? column * rows + row : row * columns + column] += scale * pack.at[i];
        }
    });
}

// values [E, size] from codes; a thread an element.
ENTRY(THREADS)
decode_stack(const u8* __restrict__ codes, const f32* __restrict__ absmax, const u8* __restrict__ nested_codes,
             const f32* __restrict__ nested_map, const f32* __restrict__ nested_offsets, bf16* __restrict__ values, i32 experts,
             i64 size) {
    i64 i = global_thread();
    if (i >= experts * size) return;
    i32 expert = i32(i / size);
    i64 element = i - expert * size;
    StackScales scales{absmax, nested_codes, nested_map, nested_offsets, (size + NF4_BLOCK - 1) / NF4_BLOCK};
    u32 code = codes[expert * stored<u8>(size) + element / 2] >> (element % 2 ? 0 : 4) & 15;
    values[i] = from_f32<bf16>(NF4_VALUES[code] * scales.of(expert).of(element / NF4_BLOCK));
}

// left [M, rows] in grouped order, right [·, columns]; gradient [rows, columns], or [columns, rows] if transposed, of each expert,
// `stride` elements apart and beginning with element `first` of them.
ENTRY(Narrow::THREADS, Narrow::BLOCKS)
grouped_outer(const bf16* __restrict__ left, const bf16* __restrict__ right, const i32* __restrict__ right_slots,
              const i32* __restrict__ offsets, f32* __restrict__ gradient, i64 stride, i64 first, i32 top, i32 rows, i32 columns,
              f32 scale, i32 transposed) {
    outer<Narrow>(left, right, right_slots, offsets, gradient + first, stride, top, rows, columns, scale, transposed);
}

#define GROUPED(name, T, tile, COLUMNS, W, OUT)                                                                              \
    ENTRY(T::THREADS, T::BLOCKS)                                                                                             \
    grouped_##name##_##tile##_##W##_##OUT(                                                                                   \
        const bf16* __restrict__ left, const i32* __restrict__ left_slots, const W* __restrict__ weight,                     \
        const f32* __restrict__ absmax, const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map,             \
        const f32* __restrict__ nested_offsets, const bf16* __restrict__ left2, const bf16* __restrict__ right2,             \
        const i32* __restrict__ tiles, const i32* __restrict__ offsets, OUT* __restrict__ out, bf16* __restrict__ copy,      \
        f32 copy_scale, i32 top, i32 columns, i32 depth, i32 depth2, i32 accumulate) {                                       \
        StackScales scales{absmax, nested_codes, nested_map, nested_offsets,                                                 \
                           (i64(columns) * depth + NF4_BLOCK - 1) / NF4_BLOCK};                                              \
        GroupEpilogue<OUT> epilogue{out, copy, copy_scale, accumulate, {}, columns};                                         \
        grouped<T, COLUMNS>(left, left_slots, weight, scales, left2, right2, tiles, offsets, epilogue, top, depth, depth2);  \
    }
GROUPED(rows, Wide, wide, false, bf16, f32)
GROUPED(rows, Wide, wide, false, bf16, bf16)
GROUPED(rows, Wide, wide, false, u8, f32)
GROUPED(rows, Wide, wide, false, u8, bf16)
GROUPED(columns, Wide, wide, true, bf16, f32)
GROUPED(columns, Wide, wide, true, bf16, bf16)
GROUPED(columns, Wide, wide, true, u8, f32)
GROUPED(columns, Wide, wide, true, u8, bf16)
GROUPED(rows, Narrow, narrow, false, bf16, f32)
GROUPED(columns, Narrow, narrow, true, bf16, f32)

#define SWIGLU(W, OUT)                                                                                                       \
    ENTRY(Wide::THREADS, Wide::BLOCKS)                                                                                       \
    grouped_swiglu_wide_##W##_##OUT(                                                                                         \
        const bf16* __restrict__ left, const i32* __restrict__ slots, const f32* __restrict__ weights,                       \
        const W* __restrict__ gate, const f32* __restrict__ gate_absmax, const u8* __restrict__ gate_codes,                  \
        const f32* __restrict__ gate_map, const f32* __restrict__ gate_offsets, const W* __restrict__ up,                    \
        const f32* __restrict__ up_absmax, const u8* __restrict__ up_codes, const f32* __restrict__ up_map,                  \
        const f32* __restrict__ up_offsets, const bf16* __restrict__ left2, const bf16* __restrict__ right2,                 \
        const i32* __restrict__ tiles, const i32* __restrict__ offsets, OUT* __restrict__ gate_out,                          \
        OUT* __restrict__ up_out, OUT* __restrict__ y, i32 top, i32 columns, i32 depth, i32 depth2) {                        \
        i64 blocks = (i64(columns) * depth + NF4_BLOCK - 1) / NF4_BLOCK;                                                     \
        StackScales gate_scales{gate_absmax, gate_codes, gate_map, gate_offsets, blocks};                                    \
        StackScales up_scales{up_absmax, up_codes, up_map, up_offsets, blocks};                                              \
        SwigluEpilogue<OUT> epilogue{gate_out, up_out, y, slots, weights, {}, columns};                                      \
        grouped_swiglu<Wide>(left, slots, gate, gate_scales, up, up_scales, left2, right2, tiles, offsets, epilogue, top,    \
                             depth, depth2);                                                                                 \
    }
SWIGLU(bf16, f32)
SWIGLU(bf16, bf16)
SWIGLU(u8, f32)
SWIGLU(u8, bf16)

#define PAIR(W, OUT)                                                                                                         \
    ENTRY(Wide::THREADS, Wide::BLOCKS)                                                                                       \
    grouped_pair_wide_##W##_##OUT(                                                                                           \
        const bf16* __restrict__ left_a, const bf16* __restrict__ left_b, const W* __restrict__ weight_a,                    \
        const f32* __restrict__ absmax_a, const u8* __restrict__ codes_a, const f32* __restrict__ map_a,                     \
        const f32* __restrict__ offsets_a, const W* __restrict__ weight_b, const f32* __restrict__ absmax_b,                 \
        const u8* __restrict__ codes_b, const f32* __restrict__ map_b, const f32* __restrict__ offsets_b,                    \
        const bf16* __restrict__ left2, const bf16* __restrict__ right2, const i32* __restrict__ tiles,                      \
        const i32* __restrict__ offsets, OUT* __restrict__ out, i32 columns, i32 depth, i32 depth2, i32 accumulate) {        \
        i64 blocks = (i64(columns) * depth + NF4_BLOCK - 1) / NF4_BLOCK;                                                     \
        StackScales scales_a{absmax_a, codes_a, map_a, offsets_a, blocks};                                                   \
        StackScales scales_b{absmax_b, codes_b, map_b, offsets_b, blocks};                                                   \
        GroupEpilogue<OUT> epilogue{out, nullptr, 0.0f, accumulate, {}, columns};                                            \
        grouped_pair<Wide>(left_a, left_b, weight_a, scales_a, weight_b, scales_b, depth, left2, right2, tiles, offsets,     \
                           epilogue, depth, depth2);                                                                         \
    }
PAIR(bf16, f32)
PAIR(bf16, bf16)
PAIR(u8, f32)
PAIR(u8, bf16)

// copy = bf16(copy_scale · (a · right_e[..depth] + b · right_e[depth..])), right [E, 2 · depth, columns]: what flows into an
// adapter that two projections share.
ENTRY(Narrow::THREADS, Narrow::BLOCKS)
grouped_pair_narrow(const bf16* __restrict__ left_a, const bf16* __restrict__ left_b, const bf16* __restrict__ right,
                    const i32* __restrict__ tiles, const i32* __restrict__ offsets, bf16* __restrict__ copy, f32 copy_scale,
                    i32 columns, i32 depth) {
    GroupEpilogue<f32> epilogue{nullptr, copy, copy_scale, 0, {}, columns};
    grouped_pair<Narrow>(left_a, left_b, right, StackScales{}, right + i64(depth) * columns, StackScales{}, 2 * i64(depth),
                         nullptr, nullptr, tiles, offsets, epilogue, depth, 0);
}
