// Mixture of experts: routing tokens to experts, grouping rows by expert, and what happens to grouped rows but for their matrices
// (grouped.cu).
//
//   route            the k largest of E logits, largest first, of equals the lower index; w = softmax's probabilities of them, or
//                    those renormalised to 1
//   route_backward   renormalised: dz_j = w_j Σ_i w_i (dw_j − dw_i) for the chosen, else 0
//                    plain:        dz_j = p_j (Σ_i p_i (dw_j − dw_i) + dw_j · Σ_{e not chosen} p_e) for the chosen,
//                                  dz_e = −p_e Σ_i p_i dw_i for the others
//   group            a stable counting sort of the slots s = t k + j by expert: offsets, slots of rows, rows of slots
//   routed_swiglu    y_m = w_m silu(gate_m) up_m;  dgate, dup as swiglu's of w_m dy_m;  dw = ⟨dy_m, silu(gate_m) up_m⟩
//   combine          y_t = Σ_j grouped[row of slot t k + j], in the order of j
//   combine_residual x_t += that sum + σ(gate_t) · shared_t: the end of a layer, in one pass over the residual stream
//
// Tensors: logits, dlogits f32 [T, E]; experts i32 and weights f32 [T, k]; slots, rows i32 [M], M = T k; offsets i32 [E + 1];
// gate, up, y, dy [M, F] and grouped [M, C] activations.
//
// Bytes: route 4 T E + 8 M; group 16 M and 8 E for 1024 slots; the others each operand once, combine (k + 1) rows of C a token,
// combine_residual two or three more.
// Limited by memory.
//
// Decomposition: a warp a token for route; it finds the chosen one by one, each the largest below the last, so nothing is marked
// and any E and k do. Grouping takes three launches: a warp counts the slots of 1024 by expert; one block turns counts into first
// rows; a warp gives each of its 1024 slots its row, 32 at a time, ranks among them by votes on the bits of the expert. Integers
// only and a fixed order: the result does not depend on timing. routed_swiglu: a warp a row. combine: a thread a pack of a token.
//
// Numerics: f32. The backward formulas sum differences instead of subtracting sums, so a weight near 1 costs no digits. NaN
// is larger than any number and makes its token's weights NaN.
//
// Faults: a slot or row outside 0..M, or an expert outside 0..E, which no routing has that `route` wrote, is reported and passed
// over.

#include "common.cuh"

constexpr i32 THREADS = 256;
constexpr i32 WARPS = THREADS / WARP_LANES;
// Slots that a warp groups.
constexpr i32 TILE = 1024;

// ---- routing -------------------------------------------------------------------------------------------------------

// Larger for a larger logit and, of equals, for a lower index. Zeros of both signs are equal, every NaN is the largest.
DEVICE u64 rank_of(f32 logit, i32 expert) {
    u32 bits = __float_as_uint(logit + 0.0f);
    u32 key = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (logit != logit) key = 0xffffffffu;
    return u64(key) << 32 | (0xffffffffu - u32(expert));
}
DEVICE i32 expert_of(u64 rank) { return i32(0xffffffffu - u32(rank)); }

ENTRY(THREADS)
route(const f32* __restrict__ logits, i32* __restrict__ chosen, f32* __restrict__ weights, i64 tokens, i32 experts, i32 top,
      i32 renormalise) {
    i64 token = i64(blockIdx.x) * WARPS + warp_index();
    if (token >= tokens) return;
    logits += token * experts, chosen += token * top, weights += token * top;
    u64 last = ~0ull;
    f32 largest = 0.0f, sum = 0.0f;
    for (i32 j = 0; j < top; j++) {
        u64 best = 0;
        for (i32 e = lane_index(); e < experts; e += WARP_LANES) {
            u64 rank = rank_of(logits[e], e);
            if ((j == 0 || rank < last) && rank > best) best = rank;
        }
        last = warp_max(best);
        f32 logit = logits[expert_of(last)];
        if (j == 0) largest = logit;
        f32 power = expf(logit - largest);
        sum += power;
        if (lane_index() == j % WARP_LANES) chosen[j] = expert_of(last), weights[j] = power;
    }
    if (!renormalise) {
        sum = 0.0f;
        for (i32 e = lane_index(); e < experts; e += WARP_LANES) sum += expf(logits[e] - largest);
        sum = warp_sum(sum);
    }
    for (i32 j = lane_index(); j < top; j += WARP_LANES) weights[j] /= sum;
}

ENTRY(THREADS)
route_backward(const f32* __restrict__ logits, const i32* __restrict__ chosen, const f32* __restrict__ dweights,
               f32* __restrict__ dlogits, i64 tokens, i32 experts, i32 top, i32 renormalise, i32* __restrict__ faults,
               i32 fault) {
    i64 token = i64(blockIdx.x) * WARPS + warp_index();
    if (token >= tokens) return;
    logits += token * experts, chosen += token * top, dweights += token * top, dlogits += token * experts;
    bool outside = false;
    for (i32 j = lane_index(); j < top; j += WARP_LANES) outside |= chosen[j] < 0 || chosen[j] >= experts;
    if (warp_votes(outside) != 0) {
        if (lane_index() == 0) report_fault(faults, fault, i32(token));
        return;
    }
    f32 largest = logits[chosen[0]];
    u64 last = rank_of(logits[chosen[top - 1]], chosen[top - 1]);
    f32 of_chosen = 0.0f, of_others = 0.0f, pull = 0.0f;
    for (i32 e = lane_index(); e < experts; e += WARP_LANES) {
        f32 power = expf(logits[e] - largest);
        if (rank_of(logits[e], e) >= last) {
            of_chosen += power;
        } else {
            of_others += power;
        }
    }
    for (i32 j = lane_index(); j < top; j += WARP_LANES) pull += expf(logits[chosen[j]] - largest) * dweights[j];
    of_chosen = warp_sum(of_chosen), of_others = warp_sum(of_others), pull = warp_sum(pull);
    if (renormalise) of_others = 0.0f;
    f32 scale = 1.0f / (of_chosen + of_others);
    for (i32 e = lane_index(); e < experts; e += WARP_LANES)
        if (rank_of(logits[e], e) < last) dlogits[e] = renormalise ? 0.0f : expf(logits[e] - largest) * scale * -(pull * scale);
    for (i32 j = lane_index(); j < top; j += WARP_LANES) {
        f32 sum = dweights[j] * of_others * scale;
        for (i32 i = 0; i < top; i++) sum += expf(logits[chosen[i]] - largest) * scale * (dweights[j] - dweights[i]);
        dlogits[chosen[j]] = expf(logits[chosen[j]] - largest) * scale * sum;
    }
}

// ---- grouping ------------------------------------------------------------------------------------------------------

// The lanes of a warp that have the same expert as this one.
DEVICE u32 peers_of(i32 expert, i32 experts, bool present) {
    u32 peers = warp_votes(present);
    for (i32 bit = 0; experts - 1 >> bit > 0; bit++) {
        u32 set = warp_votes(expert >> bit & 1);
        peers &= expert >> bit & 1 ? set : ~set;
    }
    return peers;
}

// Gives `visit` the slots of this warp's tile in their order, 32 at a time: slot, expert, how many of its expert were before it
// in the tile. `counts` [E] in shared memory counts them.
template <class Visit>
DEVICE void each_slot(const i32* chosen, i32* counts, i32 slots, i32 experts, Visit visit) {
    for (i32 e = lane_index(); e < experts; e += WARP_LANES) counts[e] = 0;
    __syncwarp();
    i64 begin = i64(blockIdx.x) * TILE;
    for (i32 step = 0; step < TILE && begin + step < slots; step += WARP_LANES) {
        i64 slot = begin + step + lane_index();
        bool present = slot < slots;
        i32 expert = present ? chosen[slot] : 0;
        u32 peers = peers_of(expert, experts, present);
        u32 earlier = peers & ((1u << lane_index()) - 1);
        i32 before = counts[expert] + count_bits(earlier);
        __syncwarp();
        if (present && earlier == 0) counts[expert] += count_bits(peers);
        __syncwarp();
        if (present) visit(i32(slot), expert, before);
    }
}

// counts [tiles, E]: slots of each tile by expert.
ENTRY(32)
group_count(const i32* __restrict__ chosen, i32* __restrict__ counts, i32 slots, i32 experts) {
    DYNAMIC_SHARED(memory);
    i32* own = reinterpret_cast<i32*>(memory);
    each_slot(chosen, own, slots, experts, [](i32, i32, i32) {});
    for (i32 e = lane_index(); e < experts; e += WARP_LANES) counts[i64(blockIdx.x) * experts + e] = own[e];
}

// Replaces the counts by the first row of each expert in each tile, and writes where every expert's rows begin. One block.
ENTRY(THREADS)
group_offsets(i32* __restrict__ counts, i32* __restrict__ offsets, i32 tiles, i32 experts) {
    DYNAMIC_SHARED(memory);
    i32* totals = reinterpret_cast<i32*>(memory);
    for (i32 e = i32(threadIdx.x); e < experts; e += THREADS) {
        i32 sum = 0;
#pragma unroll 8
        for (i32 tile = 0; tile < tiles; tile++) sum += counts[i64(tile) * experts + e];
        totals[e] = sum;
    }
    __syncthreads();
    if (warp_index() == 0) {
        // A lane has neighbouring experts: it sums them, the warp sums the lanes, and it spreads what is before them.
        i32 each = (experts + WARP_LANES - 1) / WARP_LANES;
        i32 begin = min(lane_index() * each, experts), end = min(begin + each, experts);
        i32 own = 0;
        for (i32 e = begin; e < end; e++) own += totals[e];
        i32 through = warp_sum_through(own);
        i32 row = through - own;
        for (i32 e = begin; e < end; e++) {
            offsets[e] = row;
            i32 count = totals[e];
            totals[e] = row;
            row += count;
        }
        if (lane_index() == WARP_LANES - 1) offsets[experts] = through;
    }
    __syncthreads();
    for (i32 e = i32(threadIdx.x); e < experts; e += THREADS) {
        i32 row = totals[e];
        for (i32 tile = 0; tile < tiles; tile++) {
            i32 count = counts[i64(tile) * experts + e];
            counts[i64(tile) * experts + e] = row;
            row += count;
        }
    }
}

ENTRY(32)
group_place(const i32* __restrict__ chosen, const i32* __restrict__ first_rows, i32* __restrict__ slots_of,
            i32* __restrict__ rows_of, i32 slots, i32 experts) {
    DYNAMIC_SHARED(memory);
    const i32* first = first_rows + i64(blockIdx.x) * experts;
    each_slot(chosen, reinterpret_cast<i32*>(memory), slots, experts, [&](i32 slot, i32 expert, i32 before) {
        i32 row = first[expert] + before;
        slots_of[row] = slot;
        rows_of[slot] = row;
    });
}

// ---- grouped rows --------------------------------------------------------------------------------------------------

// This warp's row and its slot; false if there is none, or it is none that `route` wrote.
DEVICE bool find_row(const i32* slots_of, i32 rows, i32& row, i32& slot, i32* faults, i32 fault) {
    i64 own = i64(blockIdx.x) * WARPS + warp_index();
    if (own >= rows) return false;
    row = i32(own), slot = slots_of[own];
    if (slot >= 0 && slot < rows) return true;
    if (lane_index() == 0) report_fault(faults, fault, slot);
    return false;
}

template <class A>
DEVICE void routed_swiglu_forward(const A* gate, const A* up, const f32* weights, const i32* slots_of, A* y, i32 rows, i32 width,
                                  i32* faults, i32 fault) {
    i32 row, slot;
    if (!find_row(slots_of, rows, row, slot, faults, fault)) return;
    bool aligned = width % PACK == 0;
    i64 begin = i64(row) * width;
    f32 weight = weights[slot];
    for (i32 first = lane_index() * PACK; first < width; first += WARP_LANES * PACK) {
        Pack g = load_pack(gate + begin, first, width, aligned), u = load_pack(up + begin, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) u.at[i] *= weight * (g.at[i] * logistic(g.at[i]));
        store_pack(y + begin, first, width, aligned, u);
    }
}

template <class A>
DEVICE void routed_swiglu_backward(const A* gate, const A* up, const f32* weights, const i32* slots_of, const A* dy, A* dgate,
                                   A* dup, f32* dweights, i32 rows, i32 width, i32* faults, i32 fault) {
    i32 row, slot;
    if (!find_row(slots_of, rows, row, slot, faults, fault)) return;
    bool aligned = width % PACK == 0;
    i64 begin = i64(row) * width;
    f32 weight = weights[slot], sum = 0.0f;
    for (i32 first = lane_index() * PACK; first < width; first += WARP_LANES * PACK) {
        Pack g = load_pack(gate + begin, first, width, aligned), u = load_pack(up + begin, first, width, aligned);
        Pack d = load_pack(dy + begin, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) {
            f32 sigma = logistic(g.at[i]), silu = g.at[i] * sigma;
            sum += d.at[i] * (silu * u.at[i]);
            f32 weighted = weight * d.at[i];
            d.at[i] = weighted * silu;
            u.at[i] = weighted * u.at[i] * sigma * (1.0f + g.at[i] * (1.0f - sigma));
        }
        store_pack(dgate + begin, first, width, aligned, u);
        store_pack(dup + begin, first, width, aligned, d);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) dweights[slot] = sum;
}

// sum += the elements from `first` on of a token's grouped rows, in the order of its slots.
template <class A>
DEVICE void add_rows_of(i64 token, const A* grouped, const i32* rows_of, Pack& sum, i32 tokens, i32 top, i32 first, i32 width,
                        i32* faults, i32 fault) {
    for (i32 j = 0; j < top; j++) {
        i32 row = rows_of[token * top + j];
        if (row < 0 || row >= i64(tokens) * top) {
            report_fault(faults, fault, row);
            continue;
        }
        Pack pack = load_pack(grouped + i64(row) * width, first, width, width % PACK == 0);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum.at[i] += pack.at[i];
    }
}

template <class A>
DEVICE void combine(const A* grouped, const i32* rows_of, A* y, i32 tokens, i32 top, i32 width, i32 accumulate, i32* faults,
                    i32 fault) {
    i32 packs = (width + PACK - 1) / PACK;
    i64 thread = global_thread(), token = thread / packs;
    i32 first = i32(thread - token * packs) * PACK;
    if (token >= tokens) return;
    bool aligned = width % PACK == 0;
    y += token * width;
    Pack sum = {};
    if (accumulate) sum = load_pack(y, first, width, aligned);
    add_rows_of(token, grouped, rows_of, sum, tokens, top, first, width, faults, fault);
    store_pack(y, first, width, aligned, sum);
}

// x_t += Σ_j grouped[row of slot t k + j] + σ(gate_t) · shared_t; without `shared` the sum alone.
template <class A>
DEVICE void combine_residual(const A* grouped, const i32* rows_of, const A* shared, const A* gate, A* x, i32 tokens, i32 top,
                             i32 width, i32* faults, i32 fault) {
    i32 packs = (width + PACK - 1) / PACK;
    i64 thread = global_thread(), token = thread / packs;
    i32 first = i32(thread - token * packs) * PACK;
    if (token >= tokens) return;
    bool aligned = width % PACK == 0;
    Pack sum = {};
    add_rows_of(token, grouped, rows_of, sum, tokens, top, first, width, faults, fault);
    if (shared != nullptr) {
        f32 open = logistic(to_f32(gate[token]));
        Pack pack = load_pack(shared + token * width, first, width, aligned);
#pragma unroll
        for (i32 i = 0; i < PACK; i++) sum.at[i] += pack.at[i] * open;
    }
    x += token * width;
    Pack stream = load_pack(x, first, width, aligned);
#pragma unroll
    for (i32 i = 0; i < PACK; i++) stream.at[i] += sum.at[i];
    store_pack(x, first, width, aligned, stream);
}

// ---- stacks --------------------------------------------------------------------------------------------------------

// target[first + i] = source[i], 16 bytes a thread.
template <class T>
DEVICE void stack_part(const T* source, T* target, i64 first, i64 count) {
    constexpr i32 EACH = 16 / sizeof(T);
    i64 i = global_thread() * EACH;
    if (i >= count) return;
    if (first % EACH == 0 && i + EACH <= count) {
        *reinterpret_cast<uint4*>(target + first + i) = *reinterpret_cast<const uint4*>(source + i);
        return;
    }
    for (i64 end = i + EACH < count ? i + EACH : count; i < end; i++) target[first + i] = source[i];
}

ENTRY(32)
stack_value(f32* __restrict__ target, i64 at, f32 value) {
    if (threadIdx.x == 0) target[at] = value;
}

#define STACK(T)                                                                                                             \
    ENTRY(THREADS)                                                                                                           \
    stack_part_##T(const T* __restrict__ source, T* __restrict__ target, i64 first, i64 count) {                             \
        stack_part<T>(source, target, first, count);                                                                         \
    }
STACK(f32)
STACK(bf16)
STACK(f16)
STACK(u8)

#define ACTIVATION(A)                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    routed_swiglu_forward_##A(const A* __restrict__ gate, const A* __restrict__ up, const f32* __restrict__ weights,         \
                              const i32* __restrict__ slots_of, A* __restrict__ y, i32 rows, i32 width,                      \
                              i32* __restrict__ faults, i32 fault) {                                                         \
        routed_swiglu_forward<A>(gate, up, weights, slots_of, y, rows, width, faults, fault);                                \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    routed_swiglu_backward_##A(const A* __restrict__ gate, const A* __restrict__ up, const f32* __restrict__ weights,        \
                               const i32* __restrict__ slots_of, const A* __restrict__ dy, A* __restrict__ dgate,            \
                               A* __restrict__ dup, f32* __restrict__ dweights, i32 rows, i32 width,                         \
                               i32* __restrict__ faults, i32 fault) {                                                        \
        routed_swiglu_backward<A>(gate, up, weights, slots_of, dy, dgate, dup, dweights, rows, width, faults, fault);        \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    combine_##A(const A* __restrict__ grouped, const i32* __restrict__ rows_of, A* __restrict__ y, i32 tokens, i32 top,      \
                i32 width, i32 accumulate, i32* __restrict__ faults, i32 fault) {                                            \
        combine<A>(grouped, rows_of, y, tokens, top, width, accumulate, faults, fault);                                      \
    }                                                                                                                        \
    ENTRY(THREADS)                                                                                                           \
    combine_residual_##A(const A* __restrict__ grouped, const i32* __restrict__ rows_of, const A* __restrict__ shared,       \
                         const A* __restrict__ gate, A* __restrict__ x, i32 tokens, i32 top, i32 width,                      \
                         i32* __restrict__ faults, i32 fault) {                                                              \
        combine_residual<A>(grouped, rows_of, shared, gate, x, tokens, top, width, faults, fault);                           \
    }
ACTIVATION(f32)
ACTIVATION(bf16)
