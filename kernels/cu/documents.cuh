// Packed documents on the device: offsets i32 [documents + 1], rising from 0, document d is rows offsets[d]..offsets[d + 1].

#pragma once
#include "common.cuh"

// The document that has `row`: the last one that begins at or before it, which empty ones never are.
DEVICE i32 document_of(const i32* offsets, i32 documents, i32 row) {
    i32 low = 0, high = documents;  // offsets[low] ≤ row < offsets[high]
    while (high - low > 1) {
        i32 middle = (low + high) / 2;
        if (offsets[middle] <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}
