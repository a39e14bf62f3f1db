// Rows grouped by expert: which rows and which expert a block has.
//
// The grid does not know how many rows an expert has: it is as large as it might be, and `tiles` i32 [blocks, 2] (grouped_tiles in
// grouped.cu) tells each block its expert and the first of its rows, or −1 that there is nothing for it.

#pragma once
#include "nf4.cuh"

// Rows `first..end` of the grouped rows, all of one expert.
struct Group {
    i32 expert, first, end;

    // The `height` rows, or fewer, that the block's line of `tiles` names; false if it names none.
    DEVICE bool find(const i32* tiles, const i32* offsets, i32 tile, i32 height) {
        expert = tiles[2 * tile];
        if (expert < 0) return false;
        first = tiles[2 * tile + 1];
        end = min(first + height, offsets[expert + 1]);
        return true;
    }
    // All rows of an expert; false if it has none.
    DEVICE bool all(const i32* offsets, i32 of) {
        expert = of, first = offsets[of], end = offsets[of + 1];
        return first < end;
    }
};

// An operand's rows as a group reads them: in grouped order, or by token, gathered on their way.
template <class T>
struct GroupRows {
    const T* values;
    const i32* slots;  // null for grouped order
    Group group;
    i32 top;
    i64 width;

    // Row `index` of the group; null beyond its end.
    DEVICE const T* row(i64 index) const {
        i64 grouped = group.first + index;
        if (grouped >= group.end) return nullptr;
        return values + (slots == nullptr ? grouped : i64(slots[grouped] / top)) * width;
    }
};

// Scales of all experts' matrices; see WeightStack in stack.rs. `nested_codes` is null where they are flat.
struct StackScales {
    const f32* absmax;
    const u8* nested_codes;
    const f32* nested_map;
    const f32* offsets;
    i64 blocks;  // of a matrix

    DEVICE Nf4Scales of(i32 expert) const {
        if (nested_codes == nullptr) return {absmax + expert * blocks, nullptr, nullptr, 0.0f};
        i64 groups = (blocks + NF4_NESTED_BLOCK - 1) / NF4_NESTED_BLOCK;
        return {absmax + expert * groups, nested_codes + expert * blocks, nested_map, offsets[expert]};
    }
};

// Elements of type W that a matrix of so many has: codes come two a byte.
template <class W>
DEVICE i64 stored(i64 elements) {
    return sizeof(W) == 1 ? (elements + 1) / 2 : elements;
}

// What is done with a finished tile of gate and up side by side: each stored where it is wanted, and the activation of what
// was, or would have been, stored.
template <class OUT>
struct SwigluEpilogue {
    OUT *gate, *up, *y;
    const i32* slots;
    const f32* weights;
    Group group;
    i64 columns;

    DEVICE void operator()(i32 row, i64 column, Pack g, Pack u) const {
        if (group.first + row >= group.end || column >= columns) return;
        bool aligned = columns % PACK == 0;
        i64 own = group.first + row, at = own * columns;
        if (gate != nullptr) store_pack(gate + at, column, columns, aligned, g), store_pack(up + at, column, columns, aligned, u);
        if (y == nullptr) return;
        f32 weight = weights[slots[own]];
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            f32 value = rounded<OUT>(g.at[i]);
            u.at[i] = rounded<OUT>(u.at[i]) * (weight * (value * logistic(value)));
        }
        store_pack(y + at, column, columns, aligned, u);
    }
};
