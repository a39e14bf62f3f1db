// A factor of a product in float32, read element by element from any encoding: what the kernels of `Precision::F32` multiply.

#pragma once
#include "nf4.cuh"

// Element (index, depth) lies at index · stride + depth · deep; beyond `count` indices it is 0. Codes are decoded, other types widened.
template <class W>
struct Factor {
    const W* values;
    Nf4Scales scales;
    i64 count, stride, deep;

    DEVICE f32 at(i64 index, i64 depth) const {
        if (index >= count) return 0.0f;
        i64 place = index * stride + depth * deep;
        if constexpr (sizeof(W) == 1) {
            u32 code = values[place / 2] >> (place % 2 ? 0 : 4) & 15;
            return rounded<bf16>(NF4_VALUES[code] * scales.of(place / NF4_BLOCK));
        } else {
            return to_f32(values[place]);
        }
    }
};
