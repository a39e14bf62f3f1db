// A persistent block of Hopper's: tiles of a product of a frozen matrix with tokens, one after another.
//
//   result [tokens, 128 outputs]ᵀ = W · xᵀ + right2 · left2ᵀ        so the matrix is the left factor of wgmma, tokens the right one
//
// Decomposition: three warp groups. The first copies: one thread of it begins the boxes of a stage by TMA (64 of the depth: N tokens,
// 128 outputs), all of it compute the stage's 128 scales where the matrix is in NF4 and gather tokens row by row where an expert's
// rows lie apart. The other two multiply 64 outputs each with all N tokens. STAGES stages form a ring; a stage is full when its bytes
// have come and its scales were written, and empty when all eight multiplying warps have done with it. The copying group runs ahead
// over the ends of tiles, so the next tile's first stages come while one is stored.
//
// A matrix in bf16 is read by wgmma from shared memory, straight ([outputs, 64]) for y and transposed ([64, outputs]) for dx. Codes
// are decoded into the registers of wgmma's left factor, so decoded elements never go through shared memory, and a thread decodes
// the next 16 of the depth while earlier ones are multiplied:
//   - for y the four lanes that share an output read its 32 bytes of codes by broadcast and pick theirs by a rotation;
//   - for dx `load_matrices_transposed` brings a lane the codes of two outputs of one depth in one byte. To use them as they come,
//     outputs are permuted within each 64 (`PLACE`), and put back when the result is stored.
// What a code stands for is read from a table of sixteen floats in sixteen banks.
//
// Shared memory, by 64 of depth: N × 128 bytes of tokens, swizzled as wgmma reads them; 16 KB of elements, or 4 KB of codes and 512
// bytes of scales. The result goes through a staging area in f32, 32 tokens at a time.
//
// Two matrices of one shape may be done at once (`Form`): beside each other, 64 outputs of each for the same tokens, or one after the
// other in depth, each with tokens of its own. A ring does not know the difference: it is stages that follow each other.
//
// A tile may also be a part of the depth only, where there are too few tiles for a device; its sums then go to memory as they are and
// somebody adds the parts in their order.
//
// Numerics: as matmul.cu: each weight is bf16(value · scale), sums are f32, the low-rank term comes last in the same registers.

#pragma once
#include "grouped.cuh"
#include "hopper.cuh"

constexpr i32 HOPPER_THREADS = 384;  // three warp groups
constexpr i32 HOPPER_OUTPUTS = 128;
constexpr i32 HOPPER_DEPTH = 64;
// Of the copying and of the multiplying threads: 128 · 56 + 256 · 224 are what 384 threads of 168 have.
constexpr i32 COPY_REGISTERS = 56;
constexpr i32 MULTIPLY_REGISTERS = 224;
// Who asks for more than the block has waits for ever.
constexpr i32 BLOCK_REGISTERS = 65536 / HOPPER_THREADS / 8 * 8 * HOPPER_THREADS;
static_assert(WARP_GROUP * COPY_REGISTERS + 2 * WARP_GROUP * MULTIPLY_REGISTERS <= BLOCK_REGISTERS, "more registers than given back");
// Tokens of a piece of the result, and the length of one's row in the staging area: 64 outputs, and four that spread rows over banks.
constexpr i32 PIECE = 32;
constexpr i32 PIECE_PITCH = 68;
// What a block may have, in bytes.
constexpr i32 HOPPER_SHARED_BYTES = 227 * 1024;

// The matrices of a tile.
enum Form {
    ALONE,    // one
    BESIDE,   // two with the same tokens: the first group's 64 outputs are of the first, the second group's are the same of the second
    IN_TURN,  // two, each with tokens of its own: the depth of the first, then that of the second, in the same sums
};

// W is bf16, or u8 for codes. COLUMNS: the matrix is [depth, outputs] instead of [outputs, depth].
template <i32 N_, bool COLUMNS_, class W_, Form FORM_ = ALONE>
struct HopperTile {
    using W = W_;
    static constexpr i32 N = N_;
    static constexpr Form FORM = FORM_;
    // Different outputs of a tile, and products whose stages follow each other.
    static constexpr i32 OUTPUTS = FORM == BESIDE ? HOPPER_OUTPUTS / 2 : HOPPER_OUTPUTS, TURNS = FORM == IN_TURN ? 2 : 1;
    static_assert(FORM != BESIDE || !COLUMNS_, "halves of a stage are rows of memory");
    static constexpr bool COLUMNS = COLUMNS_, CODES = sizeof(W) == 1;
    static constexpr i32 TOKEN_BYTES = N * HOPPER_DEPTH * 2;
    static constexpr i32 WEIGHT_BYTES = HOPPER_OUTPUTS * HOPPER_DEPTH * (CODES ? 1 : 4) / 2;
    static constexpr i32 SCALE_BYTES = CODES ? HOPPER_OUTPUTS * 4 : 0;
    static constexpr i32 STAGE_BYTES = TOKEN_BYTES + WEIGHT_BYTES + SCALE_BYTES;
    static constexpr i32 STAGING_BYTES = 2 * PIECE * PIECE_PITCH * 4;
    // As many stages as fit, but no more than eight. gpu/matmul/hopper.rs has the same formula.
    static constexpr i32 ROOM = (HOPPER_SHARED_BYTES - STAGING_BYTES - SWIZZLE_REPEAT) / STAGE_BYTES;
    static constexpr i32 STAGES = ROOM < 8 ? ROOM : 8;
    // Where things lie in shared memory. The table of codes is at its very beginning, which saves an addition a weight; barriers are
    // behind it, and the ring begins where the swizzle does.
    static constexpr i32 BARRIERS = 64, TOKENS = SWIZZLE_REPEAT;
    static constexpr i32 WEIGHTS = TOKENS + STAGES * TOKEN_BYTES, SCALES = WEIGHTS + STAGES * WEIGHT_BYTES;
    static constexpr i32 STAGING = SCALES + STAGES * SCALE_BYTES;
    static_assert(TOKEN_BYTES % SWIZZLE_REPEAT == 0 && WEIGHT_BYTES % SWIZZLE_REPEAT == 0, "stages begin where the swizzle does");
};

// What is multiplied. Maps are of tokens [·, depth], the matrix [experts, …] and the low-rank term's tokens [·, depth2]; the second
// matrix's and its tokens' where the form has them. Matrices beside each other have a right2 each, the second's behind the first's.
struct HopperOperands {
    const TensorMap* left;
    const TensorMap* weight;
    const TensorMap* left2;
    const bf16* right2;
    i32 columns, depth, depth2;
    const TensorMap* other_left = nullptr;
    const TensorMap* other_weight = nullptr;
};

// One tile: outputs from `column` on, of N tokens from `row` on, by expert `expert`, whose last token is before `end`; of the depth
// `from .. to`, which is part `part` of it. The part with the end of the depth has the low-rank term.
struct HopperJob {
    i64 row, end;
    i32 column, expert;
    i32 from, to, part;

    DEVICE i32 stages() const { return (to - from + HOPPER_DEPTH - 1) / HOPPER_DEPTH; }
    DEVICE i32 low_rank(const HopperOperands& of) const { return to == of.depth ? of.depth2 : 0; }
};

// A place in the ring, and the parity of the phase it is in.
struct RingPlace {
    i32 slot = 0;
    u32 parity = 0;

    template <i32 STAGES>
    DEVICE void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// The block's shared memory.
template <class T>
struct HopperMemory {
    u8* base;

    DEVICE u8* tokens(i32 slot) const { return base + T::TOKENS + slot * T::TOKEN_BYTES; }
    DEVICE u8* weight(i32 slot) const { return base + T::WEIGHTS + slot * T::WEIGHT_BYTES; }
    DEVICE f32* scales(i32 slot) const { return reinterpret_cast<f32*>(base + T::SCALES + slot * T::SCALE_BYTES); }
    DEVICE f32* staging(i32 group) const { return reinterpret_cast<f32*>(base + T::STAGING) + group * PIECE * PIECE_PITCH; }
    DEVICE f32* table() const { return reinterpret_cast<f32*>(base); }
    DEVICE u64* full(i32 slot) const { return reinterpret_cast<u64*>(base + T::BARRIERS) + slot; }
    DEVICE u64* empty(i32 slot) const { return full(slot) + T::STAGES; }

    // Makes barriers and table. All threads call it.
    DEVICE void prepare() const {
        if (threadIdx.x == 0) {
            for (i32 slot = 0; slot < T::STAGES; slot++) {
                barrier_init(full(slot), WARP_GROUP / WARP_LANES);
                barrier_init(empty(slot), 2 * WARP_GROUP / WARP_LANES);
            }
            barriers_publish();
        }
        if constexpr (T::CODES) nf4_table(table());
        __syncthreads();
    }
};

// ---- the copying group ---------------------------------------------------------------------------------------------

// The scale that this thread brings to the stage at `depth`: of an output for y; of an index of the depth, for one group's 64
// outputs, for dx. 0 beyond the matrix.
template <class T>
DEVICE f32 stage_scale(const Nf4Scales& scales, const HopperOperands& of, i32 column, i32 depth) {
    i32 i = i32(threadIdx.x);
    if constexpr (T::COLUMNS) {
        i32 row = depth + i % HOPPER_DEPTH, first = column + i / HOPPER_DEPTH * NF4_BLOCK;
        if (row >= of.depth || first >= of.columns) return 0.0f;
        return scales.of((i64(row) * of.columns + first) / NF4_BLOCK);
    } else {
        i32 row = column + i % T::OUTPUTS;
        if (row >= of.columns || depth >= of.depth) return 0.0f;
        return scales.of((i64(row) * of.depth + depth) / NF4_BLOCK);
    }
}

// Begins the boxes of a stage's weights; `weight` is the matrix whose turn it is.
template <class T>
DEVICE void copy_weight(const HopperMemory<T>& memory, const HopperOperands& of, const TensorMap* weight, const HopperJob& job,
                        i32 slot, i32 depth) {
    u8* to = memory.weight(slot);
    u64* full = memory.full(slot);
    if constexpr (T::FORM == BESIDE) {
        i32 along = T::CODES ? depth / 2 : depth;
        copy_box(to, weight, along, job.column, job.expert, full);
        copy_box(to + T::WEIGHT_BYTES / 2, of.other_weight, along, job.column, job.expert, full);
    } else if constexpr (T::CODES) {
        if constexpr (T::COLUMNS) {
            copy_box(to, weight, job.column / 2, depth, job.expert, full);
        } else {
            copy_box(to, weight, depth / 2, job.column, job.expert, full);
        }
    } else if constexpr (T::COLUMNS) {
        // A box is 64 outputs wide: one for each multiplying group.
        copy_box(to, weight, job.column, depth, job.expert, full);
        copy_box(to + T::WEIGHT_BYTES / 2, weight, job.column + HOPPER_OUTPUTS / 2, depth, job.expert, full);
    } else {
        copy_box(to, weight, depth, job.column, job.expert, full);
    }
}

// Brings every stage of every tile. SCHEDULE tells the tiles: `find(index, job)`, `scales(job, i)` of the first matrix or the second,
// and `gathered(job, i)`, in which row token i of the tile lies, or −1, where `gathers()` says that tokens lie apart.
template <class T, class SCHEDULE>
DEVICE void copy_tiles(const HopperMemory<T>& memory, const HopperOperands& of, const SCHEDULE& schedule) {
    RingPlace at;
    bool leads = threadIdx.x == 0;
    auto begin = [&](u32 bytes) {
        barrier_wait(memory.empty(at.slot), at.parity ^ 1);
        if (leads) barrier_expect(memory.full(at.slot), bytes);
    };
    auto end = [&] {
        __syncwarp();
        if (lane_index() == 0) barrier_arrive(memory.full(at.slot));
        at.advance<T::STAGES>();
    };
    for (i64 index = blockIdx.x; index < schedule.count(); index += gridDim.x) {
        HopperJob job;
        if (!schedule.find(index, job)) continue;
        // A row of its own box: every warp begins as many, since a warp begins one after another.
        constexpr i32 ROWS = T::N / (WARP_GROUP / WARP_LANES);  // more than a warp has only where nothing is gathered
        bool gathers = schedule.gathers() && lane_index() < ROWS;
        i32 row = warp_index() * ROWS + lane_index();
        i32 source = gathers ? schedule.gathered(job, row) : -1;
#pragma unroll 1
        for (i32 turn = 0; turn < T::TURNS; turn++) {
            const TensorMap *left = turn == 0 ? of.left : of.other_left, *weight = turn == 0 ? of.weight : of.other_weight;
            Nf4Scales scales = schedule.scales(job, T::FORM == BESIDE ? i32(threadIdx.x) / T::OUTPUTS : turn);
            f32 next = 0.0f;
            if constexpr (T::CODES) next = stage_scale<T>(scales, of, job.column, job.from);
            for (i32 depth = job.from; depth < job.to; depth += HOPPER_DEPTH) {
                f32 scale = next;
                if constexpr (T::CODES) next = stage_scale<T>(scales, of, job.column, depth + HOPPER_DEPTH);
                begin(T::TOKEN_BYTES + T::WEIGHT_BYTES);
                if (leads) copy_weight(memory, of, weight, job, at.slot, depth);
                u8* tokens = memory.tokens(at.slot);
                if (gathers) {
                    copy_box(tokens + row * HOPPER_DEPTH * 2, left, depth, source, 0, memory.full(at.slot));
                } else if (leads && !schedule.gathers()) {
                    copy_box(tokens, left, depth, i32(job.row), 0, memory.full(at.slot));
                }
                if constexpr (T::CODES) memory.scales(at.slot)[threadIdx.x] = scale;
                end();
            }
        }
        for (i32 depth = 0; depth < job.low_rank(of); depth += HOPPER_DEPTH) {
            begin(T::TOKEN_BYTES);
            if (leads) copy_box(memory.tokens(at.slot), of.left2, depth, i32(job.row), 0, memory.full(at.slot));
            end();
        }
    }
}

// ---- the multiplying groups ----------------------------------------------------------------------------------------

// Who a multiplying thread is.
struct Multiplier {
    i32 group, warp, g, t;  // of two groups, of four warps; lane = 4 g + t

    DEVICE Multiplier() {
        i32 of_block = from_lane(warp_index(), 0);
        group = of_block / 4 - 1, warp = of_block % 4, g = lane_index() / 4, t = lane_index() % 4;
    }
    // Which of the tile's outputs row g + 8 half of the warp's 16 is.
    template <class T>
    DEVICE i32 place(i32 half) const {
        if constexpr (T::CODES && T::COLUMNS) return group * 64 + warp / 2 * 32 + 4 * g + warp % 2 * 2 + half;
        return group * 64 + warp * 16 + g + 8 * half;
    }
};

// bf16 of the values of two codes, each times its scale; `first` and `second` have a code's place in the table, in bytes, in bits 2
// to 5.
DEVICE u32 decoded(const f32* table, u32 first, f32 first_scale, u32 second, f32 second_scale) {
    auto value = [&](u32 place) { return *reinterpret_cast<const f32*>(reinterpret_cast<const u8*>(table) + (place & 60)); };
    return bf16_pair(value(first) * first_scale, value(second) * second_scale);
}

// Codes and scales of a stage for y: the two rows of a thread.
template <class T>
struct StraightCodes {
    u32 words[2][8];
    f32 scale[2];
    const f32* table;
    i32 high, low;  // rotations that bring the first and the second code of this lane's byte to bits 2 to 5

    DEVICE StraightCodes(const HopperMemory<T>& memory, const Multiplier& me) {
        table = memory.table();
        high = 8 * me.t + 2, low = (8 * me.t + 30) % 32;
    }
    DEVICE void load(const HopperMemory<T>& memory, const Multiplier& me, i32 slot) {
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = me.place<T>(half);
            const uint4* codes = reinterpret_cast<const uint4*>(memory.weight(slot) + row * (HOPPER_DEPTH / 2));
            uint4 left = codes[0], right = codes[1];
            words[half][0] = left.x, words[half][1] = left.y, words[half][2] = left.z, words[half][3] = left.w;
            words[half][4] = right.x, words[half][5] = right.y, words[half][6] = right.z, words[half][7] = right.w;
            scale[half] = memory.scales(slot)[row];
        }
    }
    // The left factor of 16 of the depth.
    DEVICE void decode(u32 (&a)[4], i32 step) const {
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            i32 half = i % 2;
            u32 word = words[half][2 * step + i / 2];
            a[i] = decoded(table, rotated(word, high), scale[half], rotated(word, low), scale[half]);
        }
    }
};

// Codes and scales of a stage for dx.
template <class T>
struct TransposedCodes {
    u32 words[8];  // 8 of the depth each: of this lane's two, four outputs
    f32 scale[16];
    const f32* table;
    i32 shift;  // to the two outputs of this warp

    DEVICE TransposedCodes(const HopperMemory<T>& memory, const Multiplier& me) {
        table = memory.table();
        shift = me.warp % 2 * 8;
    }
    DEVICE void load(const HopperMemory<T>& memory, const Multiplier& me, i32 slot) {
        const u8* codes = memory.weight(slot);
        i32 chunk = me.group * 2 + me.warp / 2;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = 32 * half + lane_index();
            u32 four[4];
            load_matrices_transposed(four, codes + swizzled<4>(row, chunk) * 16);
#pragma unroll
            for (i32 i = 0; i < 4; i++) words[4 * half + i] = four[i] >> shift;
        }
#pragma unroll
        for (i32 i = 0; i < 8; i++) {
            float2 pair = *reinterpret_cast<const float2*>(memory.scales(slot) + me.group * HOPPER_DEPTH + 8 * i + 2 * me.t);
            scale[2 * i] = pair.x, scale[2 * i + 1] = pair.y;
        }
    }
    DEVICE void decode(u32 (&a)[4], i32 step) const {
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            u32 word = words[2 * step + i];
            f32 first = scale[4 * step + 2 * i], second = scale[4 * step + 2 * i + 1];
            a[2 * i] = decoded(table, word >> 2, first, word >> 18, second);
            a[2 * i + 1] = decoded(table, word << 2, first, word >> 14, second);
        }
    }
};

template <bool COLUMNS, class T>
struct CodesOf {
    using Type = StraightCodes<T>;
};
template <class T>
struct CodesOf<true, T> {
    using Type = TransposedCodes<T>;
};

// Tells the copying group that this warp has done with a slot.
template <class T>
DEVICE void release(const HopperMemory<T>& memory, i32 slot) {
    if (slot >= 0 && lane_index() == 0) barrier_arrive(memory.empty(slot));
}

// Adds the frozen matrix's term, so many stages of it. The left factor's registers are four sets used by turns: one is decoded into when the product that
// read it, four before, has ended.
template <class T>
DEVICE void add_codes(f32 (&sum)[T::N / 2], const HopperMemory<T>& memory, const Multiplier& me, RingPlace& at, i32 stages) {
    typename CodesOf<T::COLUMNS, T>::Type codes(memory, me);
    u64 ring = factor(memory.tokens(0), SWIZZLE_REPEAT);
    u32 a[4][4];
    i32 owed = -1;
    for (i32 stage = 0; stage < stages; stage++) {
        barrier_wait(memory.full(at.slot), at.parity);
        codes.load(memory, me, at.slot);
        u64 tokens = moved(ring, at.slot * T::TOKEN_BYTES);
#pragma unroll
        for (i32 step = 0; step < 4; step++) {
            products_wait<3>();
            if (step == 3) release(memory, owed);
            codes.decode(a[step], step);
            products_begin();
            multiply_async(sum, a[step], moved(tokens, 32 * step));
            products_commit();
        }
        owed = at.slot;
        at.advance<T::STAGES>();
    }
    products_wait<0>();
    release(memory, owed);
}

template <class T>
DEVICE void add_elements(f32 (&sum)[T::N / 2], const HopperMemory<T>& memory, const Multiplier& me, RingPlace& at, i32 stages) {
    u64 ring = factor(memory.tokens(0), SWIZZLE_REPEAT);
    u64 weights = factor(memory.weight(0) + me.group * (T::WEIGHT_BYTES / 2), SWIZZLE_REPEAT);
    i32 owed = -1;
    for (i32 stage = 0; stage < stages; stage++) {
        barrier_wait(memory.full(at.slot), at.parity);
        u64 tokens = moved(ring, at.slot * T::TOKEN_BYTES), weight = moved(weights, at.slot * T::WEIGHT_BYTES);
        products_begin();
#pragma unroll
        for (i32 step = 0; step < 4; step++) {
            // 16 of the depth are 32 bytes of a row, or 16 rows of 128 bytes.
            multiply_async<T::COLUMNS>(sum, moved(weight, (T::COLUMNS ? 2048 : 32) * step), moved(tokens, 32 * step));
        }
        products_commit();
        products_wait<1>();
        release(memory, owed);
        owed = at.slot;
        at.advance<T::STAGES>();
    }
    products_wait<0>();
    release(memory, owed);
}

// Two neighbours in depth of an output of the low-rank term's matrix; zeros beyond it.
template <class T>
DEVICE u32 low_rank_pair(const HopperOperands& of, const bf16* right2, i32 output, i32 k) {
    if (output >= of.columns || k >= of.depth2) return 0;
    if constexpr (T::COLUMNS) {
        const bf16* first = right2 + i64(k) * of.columns + output;
        return u32(first[0].bits) | u32(first[of.columns].bits) << 16;
    } else {
        return *reinterpret_cast<const u32*>(right2 + i64(output) * of.depth2 + k);
    }
}

// Adds right2 · left2ᵀ. It is a step or two of 16: the matrix comes from global memory straight into registers.
template <class T>
DEVICE void add_low_rank(f32 (&sum)[T::N / 2], const HopperMemory<T>& memory, const Multiplier& me, RingPlace& at,
                         const HopperOperands& of, const HopperJob& job) {
    // Beside each other, matrices have a right2 each, and the groups one of them.
    constexpr i32 EACH = T::FORM == BESIDE ? 2 : 1;
    i64 of_expert = i64(of.columns) * of.depth2;
    const bf16* right2 = of.right2 + (i64(job.expert) * EACH + (EACH == 2 ? me.group : 0)) * of_expert;
    i32 column = job.column - (EACH == 2 ? me.group * T::OUTPUTS : 0);
    u64 ring = factor(memory.tokens(0), SWIZZLE_REPEAT);
    u32 a[4];
    for (i32 k = 0; k < job.low_rank(of); k += HOPPER_DEPTH) {
        barrier_wait(memory.full(at.slot), at.parity);
#pragma unroll 1
        for (i32 step = 0; step < 4 && k + 16 * step < of.depth2; step++) {
#pragma unroll
            for (i32 i = 0; i < 4; i++)
                a[i] = low_rank_pair<T>(of, right2, column + me.place<T>(i % 2), k + 16 * step + 8 * (i / 2) + 2 * me.t);
            products_begin();
            multiply_async(sum, a, moved(ring, at.slot * T::TOKEN_BYTES + 32 * step));
            products_commit();
            products_wait<0>();
        }
        release(memory, at.slot);
        at.advance<T::STAGES>();
    }
}

// Writes 32 tokens' sums of this group to its staging area.
template <class T>
DEVICE void stage_piece(const f32 (&sum)[T::N / 2], f32* staging, const Multiplier& me, i32 piece) {
#pragma unroll
    for (i32 i = 0; i < PIECE / 2; i++) {
        i32 token = i / 4 * 8 + 2 * me.t + i % 2;
        staging[token * PIECE_PITCH + me.place<T>(i / 2 % 2) - me.group * 64] = sum[piece * (PIECE / 2) + i];
    }
}

// Gives `store` every run of eight outputs of a token: the token and the first output within the tile, and the values.
template <class T, class STORE>
DEVICE void for_each_run(const f32 (&sum)[T::N / 2], const HopperMemory<T>& memory, const Multiplier& me, STORE store) {
    f32* staging = memory.staging(me.group);
    i32 first = me.group * 64, thread = i32(threadIdx.x) % WARP_GROUP;
#pragma unroll
    for (i32 piece = 0; piece < T::N / PIECE; piece++) {
        numbered_barrier(1 + me.group, WARP_GROUP);  // the last piece's readers are done
        stage_piece<T>(sum, staging, me, piece);
        numbered_barrier(1 + me.group, WARP_GROUP);
#pragma unroll 1
        for (i32 i = thread; i < PIECE * 64 / PACK; i += WARP_GROUP) {
            Pack pack;
            load_wide(pack, staging + i / 8 * PIECE_PITCH + i % 8 * PACK);
            store(piece * PIECE + i / 8, first + i % 8 * PACK, pack);
        }
    }
}

// The same for two matrices beside each other: `store` gets the token, the first output, and the runs of both.
template <class T, class STORE>
DEVICE void for_each_pair(const f32 (&sum)[T::N / 2], const HopperMemory<T>& memory, const Multiplier& me, STORE store) {
    static_assert(PIECE * T::OUTPUTS / PACK == 2 * WARP_GROUP, "a run of each for every thread");
    i32 i = i32(threadIdx.x) - WARP_GROUP, at = i / 8 * PIECE_PITCH + i % 8 * PACK;
#pragma unroll
    for (i32 piece = 0; piece < T::N / PIECE; piece++) {
        numbered_barrier(1, 2 * WARP_GROUP);  // both groups are done with reading the last piece
        stage_piece<T>(sum, memory.staging(me.group), me, piece);
        numbered_barrier(1, 2 * WARP_GROUP);
        Pack first, second;
        load_wide(first, memory.staging(0) + at), load_wide(second, memory.staging(1) + at);
        store(piece * PIECE + i / 8, i % 8 * PACK, first, second);
    }
}

template <class T, class SCHEDULE>
DEVICE void multiply_tiles(const HopperMemory<T>& memory, const HopperOperands& of, const SCHEDULE& schedule) {
    RingPlace at;
    Multiplier me;
    for (i64 index = blockIdx.x; index < schedule.count(); index += gridDim.x) {
        HopperJob job;
        if (!schedule.find(index, job)) continue;
        f32 sum[T::N / 2];
#pragma unroll
        for (i32 i = 0; i < T::N / 2; i++) sum[i] = 0.0f;
        i32 stages = T::TURNS * job.stages();
        if constexpr (T::CODES) {
            add_codes<T>(sum, memory, me, at, stages);
        } else {
            add_elements<T>(sum, memory, me, at, stages);
        }
        add_low_rank<T>(sum, memory, me, at, of, job);
        pin(sum);
        if constexpr (T::FORM == BESIDE) {
            for_each_pair<T>(sum, memory, me, [&](i32 token, i32 output, const Pack& first, const Pack& second) {
                schedule.store(job, token, job.column + output, first, second);
            });
        } else {
            for_each_run<T>(sum, memory, me,
                            [&](i32 token, i32 output, Pack& pack) { schedule.store(job, token, job.column + output, pack); });
        }
    }
}

// ---- results -------------------------------------------------------------------------------------------------------

// Where eight outputs of a token go. There is a multiple of eight of them.
struct HopperOutput {
    const f32* bias_f32;  // either may be given
    const bf16* bias_bf16;
    bf16* out;
    i64 columns;
    i32 accumulate;

    DEVICE void store(i64 row, i32 column, Pack& pack) const {
        if (column >= columns) return;
        bf16* to = out + row * columns + column;
        if (bias_f32 != nullptr) add(pack, bias_f32 + column);
        if (bias_bf16 != nullptr) add(pack, bias_bf16 + column);
        if (accumulate) add(pack, to);
        store_wide(to, pack);
    }

    template <class A>
    static DEVICE void add(Pack& pack, const A* more) {
        Pack other;
        load_wide(other, more);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) pack.at[i] += other.at[i];
    }
};

// The whole kernel.
template <class T, class SCHEDULE>
DEVICE void hopper_product(const HopperOperands& of, const SCHEDULE& schedule) {
    DYNAMIC_SHARED(base);
    HopperMemory<T> memory{base};
    memory.prepare();
    if (threadIdx.x < WARP_GROUP) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x == 0) {
            prefetch_map(of.left), prefetch_map(of.weight);
            if constexpr (T::FORM != ALONE) prefetch_map(of.other_weight);
        }
        copy_tiles<T>(memory, of, schedule);
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        multiply_tiles<T>(memory, of, schedule);
    }
}
