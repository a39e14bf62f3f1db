// What the kernels of attention share: tiles of documents, and the rows of one head. Formulas: attention.cu.

#pragma once
#include "common.cuh"

// One tile of one document, as the host planned it: rows `first..` of the document's queries, or of its keys. Queries are the
// last positions of their document: query i sees keys 0 to i + keys − queries.
struct Tile {
    i32 query_start, queries, key_start, keys, first;

    DEVICE i32 extra_keys() const { return keys - queries; }
};

constexpr i32 TILE_FIELDS = 5;

DEVICE Tile load_tile(const i32* tiles, i32 index) {
    const i32* field = tiles + i64(index) * TILE_FIELDS;
    return Tile{field[0], field[1], field[2], field[3], field[4]};
}

// The block's tile and head; blocks of one tile follow each other, so that heads of a group find their keys in the cache.
DEVICE Tile find_tile(const i32* tiles, i32 heads, i32& head) {
    head = i32(blockIdx.x) % heads;
    return load_tile(tiles, i32(blockIdx.x) / heads);
}

// Consecutive rows of one head of a tensor [T, heads, dim], of which `count` exist.
template <class A>
struct HeadRows {
    A* first;
    i64 stride;
    i32 count, dim;

    DEVICE A* row(i32 index) const { return first + i64(index) * stride; }
    // The rows from `skipped` on.
    DEVICE HeadRows from(i32 skipped) const { return HeadRows{row(skipped), stride, count - skipped, dim}; }
};

template <class A>
DEVICE HeadRows<A> head_rows(A* tensor, i32 heads, i32 dim, i32 head, i32 start, i32 count) {
    i64 stride = i64(heads) * dim;
    return HeadRows<A>{tensor + start * stride + i64(head) * dim, stride, count, dim};
}
