// Chunks of the supervised rows, as cross_entropy.cu cuts them.

#pragma once
#include "common.cuh"

// Rows of the chunk from the `first` supervised one on, at most `chunk`.
DEVICE i64 rows_of_chunk(const i32* count, i64 first, i32 chunk) {
    i64 left = *count - first;
    return left < chunk ? left : chunk;
}
