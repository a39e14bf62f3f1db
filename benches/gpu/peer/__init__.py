"""What is measured beside the kernels: libraries that do the same work, each by one function that makes its operands and its call.

A peer is a name and a function without arguments. The function gives two others: the call that is timed, and what judges it, which
gives pairs of a result and of what it should be, in float32, for a part of the call's own operands. A peer that cannot be
measured raises `Absent` with the reason.
"""
import importlib
import json
import math
import os

# Where peers run; a test has "cpu" here.
DEVICE = ["cuda"]
# Operands are taken in turns until they exceed twice the H200's cache, as ours are.
CACHE_BYTES = 120e6
MOST_TURNS = 16
# Rows that are judged.
ROWS = 128


class Absent(Exception):
    """A peer that cannot be measured here, and why."""


def package(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # an installed package may still fail to load
        raise Absent(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}") from error


def normal(torch, shape, scale=1.0, dtype=None):
    return (torch.randn(shape, device=DEVICE[0]) * scale).to(dtype or torch.bfloat16)


def turns(case):
    return max(1, min(MOST_TURNS, math.ceil(CACHE_BYTES / case["bytes"])))


def cycled(sets, call):
    """A call that takes the next set of operands each time."""
    place = [0]

    def body():
        place[0] = (place[0] + 1) % len(sets)
        return call(*sets[place[0]])
    return body


def backward_of(torch, output, inputs, gradient):
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def differences(torch, pairs):
    """Largest and mean difference over the root mean square of the reference, of the pair that is farthest off; as ours are judged."""
    worst, elements = None, 0
    for result, reference in pairs:
        result, reference = result.detach().double(), reference.detach().double()
        if result.shape != reference.shape:
            raise Absent(f"its result has shape {tuple(result.shape)}, not {tuple(reference.shape)}")
        scale = reference.square().mean().sqrt()
        off = (result - reference).abs()
        found = {"largest": float(off.max() / scale), "mean": float(off.mean() / scale)}
        elements += reference.numel()
        if worst is None or not found["mean"] <= worst["mean"]:
            worst = found
    return dict(worst, elements=elements, against="float32 in torch")


# ---- NF4 -------------------------------------------------------------------------------------------------------------

def quantised(torch, weight, nested=True):
    """Codes and state as bitsandbytes has them."""
    functional = package("bitsandbytes.functional")
    return functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")


def nf4(torch, outputs, inputs):
    return quantised(torch, normal(torch, (outputs, inputs), 1 / math.sqrt(inputs)))


def decoded(torch, codes, state, rows):
    """The first rows of a matrix, decoded in float32 by nothing but torch."""
    functional = package("bitsandbytes.functional")
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    inputs = state.shape[1]
    count = rows * inputs
    packed = codes.flatten()[:count // 2]
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
    scales = absmax.float().repeat_interleave(64)[:count]
    return (state.code.float()[nibbles] * scales).view(rows, inputs)


# ---- routed rows -----------------------------------------------------------------------------------------------------

STRIDE = 1031


def expert_counts(tokens, experts, top, skewed):
    """Rows of each expert, exactly as `routing.rs` has them."""
    with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "routing.json"), encoding="utf-8") as file:
        stored = json.load(file)["counts"]
    shares = [stored[expert % len(stored)] for expert in range(experts)] if skewed else [1] * experts
    total, whole = tokens * top, max(sum(shares), 1)
    counts = [min(total * share // whole, tokens) for share in shares]
    left = total - sum(counts)
    for may_be_empty in (False, True):
        given = True
        while left > 0 and given:
            given = False
            for expert in range(experts):
                if left > 0 and counts[expert] < tokens and (shares[expert] > 0 or may_be_empty):
                    counts[expert] += 1
                    left -= 1
                    given = True
    return counts


class Routing:
    """Rows sorted by expert: the token of each, where each expert's end, and the experts of each token."""

    def __init__(self, torch, s):
        tokens, top = s["tokens"], s["top"]
        self.counts = expert_counts(tokens, s["experts"], top, s["skewed"])
        expert = torch.repeat_interleave(torch.arange(s["experts"]), torch.tensor(self.counts))
        token = torch.arange(tokens * top) * STRIDE % tokens
        # Rows of an expert in the order of their tokens.
        order = (expert * tokens + token).argsort()
        self.token = token[order].to(DEVICE[0])
        self.ends = torch.tensor(self.counts).cumsum(0).to(torch.int32).to(DEVICE[0])
        by_token = (token * s["experts"] + expert).argsort()
        self.chosen = expert[by_token].view(tokens, top).to(DEVICE[0])
        self.bounds = [0, *self.ends.tolist()]

    def spans(self, rows):
        """(expert, its rows) of the experts whose rows are all within the first so many, one at least."""
        used = [(e, slice(a, b)) for e, (a, b) in enumerate(zip(self.bounds, self.bounds[1:])) if b > a]
        return [(e, span) for e, span in used if span.stop <= rows] or used[:1]
