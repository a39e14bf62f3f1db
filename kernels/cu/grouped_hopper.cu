// Layers of routed experts by Hopper's tensor cores: what grouped.cu does for layers, for sm_90a.
//
//   hopper_grouped_rows      out_m = left_m W_eᵀ + left2_m right2_eᵀ
//   hopper_grouped_columns   out_m = left_m W_e + left2_m right2_e
//
// Tensors: as grouped.cu; left by token or grouped, left2 and W by maps, out bf16. The limits are those of matmul_hopper.cu, and
// grouped.cu is the twin.
//
// Bytes: W of the experts that have rows once, as long as an expert's tiles follow each other closely enough for the second level of
// cache to keep it.
//
// Decomposition: hopper_tile.cuh. A tile has rows of one expert only: 64 (`narrow`) or 128 (`middle`) of them, named by the
// list that grouped_tiles makes on the device. Tiles of the same rows follow each other, so an expert's blocks run side by side. Rows
// in the order of tokens are gathered by the copy engine, a box of one row each, so no grouped copy of x exists. Rows beyond an
// expert's end are another expert's, or zeros, and are not stored.

#include "hopper_tile.cuh"

// All tiles of a routing.
template <class T>
struct GroupTiles {
    const i32* tiles;
    const i32* offsets;
    const i32* slots;  // null for grouped order
    i32 top, groups;
    StackScales of_stack;
    HopperOutput output;

    DEVICE i64 column_tiles() const { return (output.columns + HOPPER_OUTPUTS - 1) / HOPPER_OUTPUTS; }
    DEVICE i64 count() const { return groups * column_tiles(); }

    DEVICE bool find(i64 index, HopperJob& job) const {
        Group group;
        if (!group.find(tiles, offsets, i32(index / column_tiles()), T::N)) return false;
        job.row = group.first, job.end = group.end, job.expert = group.expert;
        job.column = i32(index % column_tiles()) * HOPPER_OUTPUTS;
        return true;
    }
    DEVICE Nf4Scales scales(const HopperJob& job) const { return of_stack.of(job.expert); }
    DEVICE bool gathers() const { return slots != nullptr; }
    DEVICE i32 gathered(const HopperJob& job, i32 token) const {
        return job.row + token < job.end ? slots[job.row + token] / top : -1;
    }
    DEVICE void store(const HopperJob& job, i32 token, i32 column, Pack& pack) const {
        if (job.row + token < job.end) output.store(job.row + token, column, pack);
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
        GroupTiles<T> all{tiles, offsets, left_slots, top, groups, scales, {nullptr, nullptr, out, columns, accumulate}};  \
        hopper_product<T>({&left, &weight, &left2, right2, columns, depth, depth2}, all);                                  \
    }
HOPPER_GROUPED(rows, false, narrow, 64, bf16)
HOPPER_GROUPED(rows, false, narrow, 64, u8)
HOPPER_GROUPED(rows, false, middle, 128, bf16)
HOPPER_GROUPED(rows, false, middle, 128, u8)
HOPPER_GROUPED(columns, true, narrow, 64, bf16)
HOPPER_GROUPED(columns, true, narrow, 64, u8)
HOPPER_GROUPED(columns, true, middle, 128, bf16)
HOPPER_GROUPED(columns, true, middle, 128, u8)
