// Chunks of the supervised rows, as cross_entropy.cu cuts them, and what becomes of their logits.

#pragma once
#include "common.cuh"

// Columns of a run: eight lanes with a pack each.
constexpr i32 RUN = 64;

// Rows of the chunk from the `first` supervised one on, at most `chunk`.
DEVICE i64 rows_of_chunk(const i32* count, i64 first, i32 chunk) {
    i64 left = *count - first;
    return left < chunk ? left : chunk;
}

// The power of two by which the exponentials of a run are divided, where its largest logit is this: as a rule none. Beyond e^±44 they
// would come near the ends of f32, which bf16 has too; then the multiple of 64 that is nearest.
DEVICE f32 reference_of(f32 largest) {
    constexpr f32 PLAIN = 44.0f, STEPS_OF_E = 0.022542110013890053f;  // 1 / (64 ln 2)
    bool plain = largest >= -PLAIN && largest <= PLAIN || largest == -infinity();  // nothing but zeros needs no divisor
    return plain ? 0.0f : 64.0f * rintf(largest * STEPS_OF_E);
}

// e^z / 2^reference, in two instructions; −∞ gives 0. Its error is that of z · log₂ e in f32, as large as that of z itself.
DEVICE f32 exponential(f32 z, f32 reference) {
    constexpr f32 LOG2_E = 1.44269504088896341f;
    return power_of_two(__fmaf_rn(z, LOG2_E, -reference));
}

// What a chunk's logits leave: they are in registers only.
struct Exponentials {
    const i32* labels;  // [R] of the chunk's rows
    bf16* powers;       // [R, P]: e^z / 2^reference of the run, 0 at the label and from V on; may be null
    f32* runs;          // [R, P / 64, 2]: the sum of a run's powers, the label's not among them, and its reference
    f32* label_logits;  // [R]
    i32 vocabulary;
    i64 pitch;          // P, a multiple of 64

    // Eight columns of a row. The lanes of a run call it together, whether the row exists or not.
    DEVICE void store(i64 row, i32 column, bool exists, Pack& pack) const {
        f32 largest = -infinity();
        if (column + PACK > vocabulary) {
#pragma unroll
            for (i32 i = 0; i < PACK; i++) pack.at[i] = column + i < vocabulary ? pack.at[i] : -infinity();
        }
#pragma unroll
        for (i32 i = 0; i < PACK; i++) largest = fmaxf(largest, pack.at[i]);
        f32 reference = reference_of(lanes_max<RUN / PACK>(largest));
        exists = exists && column < pitch;
        i32 label = exists ? labels[row] - column : -1;
        if (label >= 0 && label < PACK) {
#pragma unroll
            for (i32 i = 0; i < PACK; i++) {
                if (i != label) continue;
                label_logits[row] = pack.at[i];
                pack.at[i] = -infinity();
            }
        }
        f32 sum = 0.0f;
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            pack.at[i] = exponential(pack.at[i], reference);
            sum += pack.at[i];
        }
        sum = lanes_sum<RUN / PACK>(sum);
        if (!exists) return;
        if (powers != nullptr) store_wide(powers + row * pitch + column, pack);
        if (column % RUN == 0) {
            f32* run = runs + (row * pitch + column) / RUN * 2;
            run[0] = sum, run[1] = reference;
        }
    }
};
