// Layers of routed experts by Hopper's tensor cores: what grouped.cu does for layers, for sm_90a.
//
//   hopper_grouped_rows      out_m = left_m W_eᵀ + left2_m right2_eᵀ
//   hopper_grouped_columns   out_m = left_m W_e + left2_m right2_e
//   hopper_grouped_swiglu    gate_m = left_m G_eᵀ + left2_m R_eᵀ, up_m likewise,  y_m = w_m silu(gate_m) up_m
//   hopper_grouped_pair      out_m = a_m A_e + b_m B_e + left2_m right2_e
//
// Tensors: as grouped.cu; left by token or grouped, left2 and W by maps, out bf16. The limits are those of matmul_hopper.cu, and
// grouped.cu is the twin.
//
// Bytes: W of the experts that have rows once, as long as an expert's tiles follow each other closely enough for the second level of
// cache to keep it. hopper_grouped_swiglu writes of gate, up and y what is asked for and reads none of them; hopper_grouped_pair writes
// out once.
//
// Decomposition: hopper_tile.cuh. A tile has rows of one expert only: 64 (`narrow`), 128 (`middle`) or 256 (`wide`, in grouped order
// only) of them, named by the list that grouped_tiles makes on the device. Tiles of the same rows follow each other, so an expert's blocks run side by side. Rows
// in the order of tokens are gathered by the copy engine, a box of one row each, so no grouped copy of x exists. Rows beyond an
// expert's end are another expert's, or zeros, and are not stored. Of hopper_grouped_swiglu's tile one group multiplies 64 columns of
// gate, the other the same 64 of up; they meet in the staging area. hopper_grouped_pair's stages are those of both products, one after
// the other. An element's sum has the order of hopper_grouped_rows or hopper_grouped_columns, so gate and up have their bits.

#include "hopper_tile.cuh"

// Where a tile's rows of one product go.
struct GroupStore {
    HopperOutput output;

    DEVICE void store(const HopperJob& job, i32 token, i32 column, Pack& pack) const {
        if (job.row + token < job.end) output.store(job.row + token, column, pack);
    }
};

// Where those of gate and up go.
struct SwigluStore {
    SwigluEpilogue<bf16> epilogue;

    DEVICE void store(const HopperJob& job, i32 token, i32 column, const Pack& gate, const Pack& up) const {
        SwigluEpilogue<bf16> of_job = epilogue;
        of_job.group = {job.expert, i32(job.row), i32(job.end)};
        of_job(token, column, gate, up);
    }
};

// All tiles of a routing. STORE tells what is done with a finished one.
template <class T, class STORE>
struct GroupTiles {
    const i32* tiles;
    const i32* offsets;
    const i32* slots;  // null for grouped order
    i32 top, groups, columns, depth;
    StackScales of_stack, of_other;  // the second where the form has two matrices
    STORE output;

    DEVICE i64 column_tiles() const { return (columns + T::OUTPUTS - 1) / T::OUTPUTS; }
    DEVICE i64 count() const { return groups * column_tiles(); }

    DEVICE bool find(i64 index, HopperJob& job) const {
        Group group;
        if (!group.find(tiles, offsets, i32(index / column_tiles()), T::N)) return false;
        job.row = group.first, job.end = group.end, job.expert = group.expert;
        job.column = i32(index % column_tiles()) * T::OUTPUTS;
        job.part = 0, job.from = 0, job.to = depth;
        return true;
    }
    DEVICE Nf4Scales scales(const HopperJob& job, i32 matrix) const {
        if (T::FORM == ALONE || matrix == 0) return of_stack.of(job.expert);
        return of_other.of(job.expert);
    }
    DEVICE bool gathers() const { return slots != nullptr; }
    DEVICE i32 gathered(const HopperJob& job, i32 token) const {
        return job.row + token < job.end ? slots[job.row + token] / top : -1;
    }
    template <class... PACKS>
    DEVICE void store(const HopperJob& job, i32 token, i32 column, PACKS&... packs) const {
        output.store(job, token, column, packs...);
    }
};

#define HOPPER_GROUPED(name, COLUMNS, size, N, W)                                                                          \
    ENTRY(HOPPER_THREADS, 1)                                                                                               \
    hopper_grouped_##name##_##size##_##W(                                                                                  \
        MAP left, const i32* __restrict__ left_slots, MAP weight, const f32* __restrict__ absmax,                          \
        const u8* __restrict__ nested_codes, const f32* __restrict__ nested_map, const f32* __restrict__ nested_offsets,   \
        MAP left2, const bf16* __restrict__ right2, const i32* __restrict__ tiles, const i32* __restrict__ offsets,        \
        bf16* __restrict__ out, i32 groups, i32 top, i32 columns, i32 depth, i32 depth2, i32 accumulate) {                 \
        using T = HopperTile<N, COLUMNS, W>;                                                                               \
        StackScales scales{absmax, nested_codes, nested_map, nested_offsets, i64(columns) * depth / NF4_BLOCK};            \
        GroupTiles<T, GroupStore> all{tiles, offsets, left_slots, top, groups, columns, depth, scales, scales,             \
                                      {{nullptr, nullptr, out, columns, accumulate}}};                                     \
        hopper_product<T>({&left, &weight, &left2, right2, columns, depth, depth2}, all);                                  \
    }
HOPPER_GROUPED(rows, false, narrow, 64, bf16)
HOPPER_GROUPED(rows, false, narrow, 64, u8)
HOPPER_GROUPED(rows, false, middle, 128, bf16)
HOPPER_GROUPED(rows, false, middle, 128, u8)
HOPPER_GROUPED(rows, false, wide, 256, bf16)
HOPPER_GROUPED(rows, false, wide, 256, u8)
HOPPER_GROUPED(columns, true, narrow, 64, bf16)
HOPPER_GROUPED(columns, true, narrow, 64, u8)
HOPPER_GROUPED(columns, true, middle, 128, bf16)
HOPPER_GROUPED(columns, true, middle, 128, u8)
HOPPER_GROUPED(columns, true, wide, 256, bf16)
HOPPER_GROUPED(columns, true, wide, 256, u8)

// left by token, gate and up stacks [E, columns, depth], right2 [E, 2 · columns, R]. Gate and up, or y, may be left out.
#define HOPPER_SWIGLU(size, N, W)                                                                                          \
    ENTRY(HOPPER_THREADS, 1)                                                                                               \
    hopper_grouped_swiglu_##size##_##W(                                                                                    \
        MAP left, const i32* __restrict__ slots, const f32* __restrict__ weights, MAP gate,                                \
        const f32* __restrict__ gate_absmax, const u8* __restrict__ gate_codes, const f32* __restrict__ gate_map,          \
        const f32* __restrict__ gate_offsets, MAP up, const f32* __restrict__ up_absmax, const u8* __restrict__ up_codes,  \
        const f32* __restrict__ up_map, const f32* __restrict__ up_offsets, MAP left2, const bf16* __restrict__ right2,    \
        const i32* __restrict__ tiles, const i32* __restrict__ offsets, bf16* __restrict__ gate_out,                       \
        bf16* __restrict__ up_out, bf16* __restrict__ y, i32 groups, i32 top, i32 columns, i32 depth, i32 depth2) {        \
        using T = HopperTile<N, false, W, BESIDE>;                                                                         \
        i64 blocks = i64(columns) * depth / NF4_BLOCK;                                                                     \
        StackScales of_gate{gate_absmax, gate_codes, gate_map, gate_offsets, blocks};                                      \
        StackScales of_up{up_absmax, up_codes, up_map, up_offsets, blocks};                                                \
        GroupTiles<T, SwigluStore> all{tiles,   offsets, slots, top, groups, columns, depth,                               \
                                       of_gate, of_up,   {{gate_out, up_out, y, slots, weights, {}, columns}}};            \
        hopper_product<T>({&left, &gate, &left2, right2, columns, depth, depth2, nullptr, &up}, all);                      \
    }
HOPPER_SWIGLU(narrow, 64, bf16)
HOPPER_SWIGLU(narrow, 64, u8)
HOPPER_SWIGLU(middle, 128, bf16)
HOPPER_SWIGLU(middle, 128, u8)

// left_a and left_b in grouped order, both stacks [E, depth, columns].
#define HOPPER_PAIR(size, N, W)                                                                                            \
    ENTRY(HOPPER_THREADS, 1)                                                                                               \
    hopper_grouped_pair_##size##_##W(                                                                                      \
        MAP left_a, MAP left_b, MAP weight_a, const f32* __restrict__ absmax_a, const u8* __restrict__ codes_a,            \
        const f32* __restrict__ map_a, const f32* __restrict__ offsets_a, MAP weight_b, const f32* __restrict__ absmax_b,  \
        const u8* __restrict__ codes_b, const f32* __restrict__ map_b, const f32* __restrict__ offsets_b, MAP left2,       \
        const bf16* __restrict__ right2, const i32* __restrict__ tiles, const i32* __restrict__ offsets,                   \
        bf16* __restrict__ out, i32 groups, i32 columns, i32 depth, i32 depth2) {                                          \
        using T = HopperTile<N, true, W, IN_TURN>;                                                                         \
        i64 blocks = i64(columns) * depth / NF4_BLOCK;                                                                     \
        StackScales of_a{absmax_a, codes_a, map_a, offsets_a, blocks}, of_b{absmax_b, codes_b, map_b, offsets_b, blocks};  \
        GroupTiles<T, GroupStore> all{tiles, offsets, nullptr, 1, groups, columns, depth, of_a, of_b,                      \
                                      {{nullptr, nullptr, out, columns, 0}}};                                              \
        hopper_product<T>({&left_a, &weight_a, &left2, right2, columns, depth, depth2, &left_b, &weight_b}, all);          \
    }
HOPPER_PAIR(narrow, 64, bf16)
HOPPER_PAIR(narrow, 64, u8)
HOPPER_PAIR(middle, 128, bf16)
HOPPER_PAIR(middle, 128, u8)
HOPPER_PAIR(wide, 256, bf16)
HOPPER_PAIR(wide, 256, u8)
