#!/usr/bin/env python3
"""The GPU bench beside its peers: bitsandbytes, torch, flash-linear-attention, Liger, and what transformers does by default.

    cargo build --release -p brightrun-kernels --bench gpu
    python benches/gpu/peers.py --bench target/release/deps/gpu-… --out FOLDER [--only K5] [--seconds 500]

Both sides run in turns on one GPU (A B A B …), each timed by CUDA events over the same number of calls; a process waits while the
other measures. Warm-up and compilation are apart. A peer whose package is missing is named as absent, and so is one whose fast path did
not run: the kernels of one call are read from a profile and written beside its times. Our products are compared with float32 on
their own operands. Writes one JSON line per case to FOLDER/bench.jsonl: shapes, median and 10-90% of both, what the peers are,
versions, clocks.

A peer is a function of this file that makes operands like ours and returns a call; the best peer of a case counts.
"""
import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time

ROUNDS = 5
PER_ROUND = 4
# Multiplied by the bytes of a case's operands, sets are taken in turn until this is exceeded: twice the H200's cache.
CACHE_BYTES = 120e6
MOST_TURNS = 16


class Absent(Exception):
    """A peer that cannot be measured here, and why."""


def package(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # an installed package may still fail to load
        raise Absent(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}") from error


# ---- ours ------------------------------------------------------------------------------------------------------------

class Ours:
    """The bench program, answering a JSON line for each line."""

    def __init__(self, program, more):
        self.process = subprocess.Popen([program, "--serve", *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"the bench ended at `{line}` with status {self.process.wait()}")
        return json.loads(answer)

    def end(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


# ---- peers -----------------------------------------------------------------------------------------------------------

def normal(torch, shape, scale=1.0, dtype=None):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype or torch.bfloat16)


def turns(bytes_moved):
    return max(1, min(MOST_TURNS, math.ceil(CACHE_BYTES / bytes_moved)))


def cycled(sets, call):
    """A call that takes the next set of operands each time."""
    place = [0]

    def body():
        place[0] = (place[0] + 1) % len(sets)
        return call(*sets[place[0]])
    return body


def nf4(torch, outputs, inputs):
    functional = package("bitsandbytes.functional")
    weight = normal(torch, (outputs, inputs), 1 / math.sqrt(inputs))
    return functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def peers_copy(torch, s, case):
    x = normal(torch, (s["elements"],))
    y = torch.empty_like(x)
    yield "torch copy_", lambda: (lambda: y.copy_(x))


def peers_dequantize(torch, s, case):
    def bitsandbytes():
        functional = package("bitsandbytes.functional")
        codes, state = nf4(torch, s["outputs"], s["inputs"])
        return lambda: functional.dequantize_4bit(codes, state)
    yield "bitsandbytes dequantize_4bit", bitsandbytes


def peers_quantize(torch, s, case):
    def bitsandbytes():
        functional = package("bitsandbytes.functional")
        weight = normal(torch, (s["outputs"], s["inputs"]), 0.02)
        return lambda: functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    yield "bitsandbytes quantize_4bit", bitsandbytes


def peers_linear(torch, s, case):
    tokens, outputs, inputs, rank = s["tokens"], s["outputs"], s["inputs"], s["rank"]
    count = turns(case["bytes"])
    a, b = normal(torch, (max(rank, 1), inputs), 0.02), normal(torch, (outputs, max(rank, 1)), 0.02)

    def with_lora(y, x):
        return y if rank == 0 else y + 2.0 * ((x @ a.T) @ b.T)

    def bitsandbytes():
        bnb = package("bitsandbytes")
        sets = [(normal(torch, (tokens, inputs)), *nf4(torch, outputs, inputs)) for _ in range(count)]
        return cycled(sets, lambda x, codes, state: with_lora(bnb.matmul_4bit(x, codes.t(), quant_state=state), x))

    def dequantised():
        functional = package("bitsandbytes.functional")
        sets = [(normal(torch, (tokens, inputs)), *nf4(torch, outputs, inputs)) for _ in range(count)]
        return cycled(sets, lambda x, codes, state: with_lora(x @ functional.dequantize_4bit(codes, state).T, x))

    def resident():
        sets = [(normal(torch, (tokens, inputs)), normal(torch, (outputs, inputs), 0.02)) for _ in range(count)]
        return cycled(sets, lambda x, weight: with_lora(x @ weight.T, x))
    if s["nf4"]:
        yield "bitsandbytes matmul_4bit", bitsandbytes
        yield "bitsandbytes dequantize + cuBLAS", dequantised
    yield "cuBLAS, bf16 resident", resident


def peers_linear_dx(torch, s, case):
    tokens, outputs, inputs = s["tokens"], s["outputs"], s["inputs"]
    count = turns(case["bytes"])

    def dequantised():
        functional = package("bitsandbytes.functional")
        sets = [(normal(torch, (tokens, outputs)), *nf4(torch, outputs, inputs)) for _ in range(count)]
        return cycled(sets, lambda dy, codes, state: dy @ functional.dequantize_4bit(codes, state))

    def resident():
        sets = [(normal(torch, (tokens, outputs)), normal(torch, (outputs, inputs), 0.02)) for _ in range(count)]
        return cycled(sets, lambda dy, weight: dy @ weight)
    yield "bitsandbytes dequantize + cuBLAS", dequantised
    yield "cuBLAS, bf16 resident", resident


def routing(torch, s):
    """Rows sorted by expert and where each expert's end, as skewed as ours."""
    tokens, experts, top = s["tokens"], s["experts"], s["top"]
    generator = torch.Generator(device="cpu").manual_seed(11)
    rank = torch.randperm(experts, generator=generator).to(DEVICE)
    logits = torch.randn(tokens, experts, device=DEVICE) - 0.8 * torch.log1p(rank.float())
    chosen = logits.topk(top).indices.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts)
    return order // top, counts.cumsum(0).to(torch.int32)


def stacked(torch, s):
    """Codes of all experts as one matrix, and it in bf16."""
    rows = s["experts"] * s["outputs"]
    codes, state = nf4(torch, rows, s["inputs"])
    return codes, state


def grouped_mm(torch):
    found = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Absent("torch has no grouped_mm")
    return found


def peers_grouped(torch, s, case):
    shape = (s["experts"], s["outputs"], s["inputs"])

    def dequantised():
        functional, product = package("bitsandbytes.functional"), grouped_mm(torch)
        token, ends = routing(torch, s)
        x, (codes, state) = normal(torch, (s["tokens"], s["inputs"])), stacked(torch, s)
        return lambda: product(x[token], functional.dequantize_4bit(codes, state).view(shape).transpose(-2, -1), offs=ends)

    def resident():
        product = grouped_mm(torch)
        token, ends = routing(torch, s)
        x, weight = normal(torch, (s["tokens"], s["inputs"])), normal(torch, shape, 0.02)
        return lambda: product(x[token], weight.transpose(-2, -1), offs=ends)

    def eager():
        token, ends = routing(torch, s)
        x, weight = normal(torch, (s["tokens"], s["inputs"])), normal(torch, shape, 0.02)
        bounds = [0, *ends.tolist()]

        def body():
            rows = x[token]
            return [rows[bounds[e]:bounds[e + 1]] @ weight[e].T for e in range(s["experts"])]
        return body
    yield "bitsandbytes dequantize + torch grouped_mm", dequantised
    yield "torch grouped_mm, bf16 resident", resident
    yield "loop over experts, bf16 resident", eager
    yield GROUPED_NF4, lambda: fused_nf4(torch, s, "gemm_4bit_grouped", s["inputs"])


# K8: the one public fused kernel of this kind.
GROUPED_NF4 = "grouped-nf4-gemm (K8)"


def fused_nf4(torch, s, function, width):
    """Its layout: codes [E, N, K / 2], float32 scales [E, N, K / 64], rows sorted by expert, experts without rows left out."""
    product = getattr(package("nf4_grouped"), function)
    functional = package("bitsandbytes.functional")
    outputs, inputs = s["outputs"], s["inputs"]
    weight = normal(torch, (s["experts"] * outputs, inputs), 1 / math.sqrt(inputs))
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    del weight
    codes = codes.view(s["experts"], outputs, inputs // 2)
    scales = state.absmax.view(s["experts"], outputs, inputs // 64).float()
    token, ends = routing(torch, s)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    used = [expert for expert, count in enumerate(counts) if count]
    sizes, used = [counts[expert] for expert in used], torch.tensor(used, dtype=torch.int32, device=DEVICE)
    if function == "gemm_4bit_grouped":
        x = normal(torch, (s["tokens"], width))
        return lambda: product(x[token], codes, scales, sizes, used)
    rows = normal(torch, (s["tokens"] * s["top"], width))
    return lambda: product(rows, codes, scales, sizes, used)


def peers_experts(torch, s, case):
    """K6: transformers' own module, as a model has it by default and with grouped products, bf16 resident."""
    def module(implementation):
        def make():
            family = package("transformers.models.qwen3_next.modeling_qwen3_next")
            config = package("transformers").Qwen3NextConfig(
                num_experts=s["experts"], num_experts_per_tok=s["top"], moe_intermediate_size=s["inner"], hidden_size=s["width"])
            config._experts_implementation = implementation
            with torch.device(DEVICE), torch.no_grad():
                experts = family.Qwen3NextExperts(config).to(torch.bfloat16)
                for parameter in experts.parameters():
                    parameter.normal_(0, 0.02).requires_grad_(False)
            generator = torch.Generator(device="cpu").manual_seed(11)
            rank = torch.randperm(s["experts"], generator=generator).to(DEVICE)
            logits = torch.randn(s["tokens"], s["experts"], device=DEVICE) - 0.8 * torch.log1p(rank.float())
            weights, chosen = logits.softmax(-1).topk(s["top"])
            weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
            x = normal(torch, (s["tokens"], s["width"]))
            return lambda: experts(x, chosen, weights)
        return make
    yield "transformers Qwen3NextExperts, eager (its default)", module("eager")
    yield "transformers Qwen3NextExperts, grouped_mm", module("grouped_mm")


def peers_grouped_dx(torch, s, case):
    shape = (s["experts"], s["outputs"], s["inputs"])
    rows = s["tokens"] * s["top"]

    def dequantised():
        functional, product = package("bitsandbytes.functional"), grouped_mm(torch)
        _, ends = routing(torch, s)
        dy, (codes, state) = normal(torch, (rows, s["outputs"])), stacked(torch, s)
        return lambda: product(dy, functional.dequantize_4bit(codes, state).view(shape), offs=ends)

    def resident():
        product = grouped_mm(torch)
        _, ends = routing(torch, s)
        dy, weight = normal(torch, (rows, s["outputs"])), normal(torch, shape, 0.02)
        return lambda: product(dy, weight, offs=ends)
    yield "bitsandbytes dequantize + torch grouped_mm", dequantised
    yield "torch grouped_mm, bf16 resident", resident
    yield GROUPED_NF4, lambda: fused_nf4(torch, s, "dgrad_4bit_grouped", s["outputs"])


def peers_grouped_lora(torch, s, case):
    rows, rank = s["tokens"] * s["top"], s["rank"]

    def operands():
        token, ends = routing(torch, s)
        x, dy = normal(torch, (s["tokens"], s["inputs"])), normal(torch, (rows, s["outputs"]))
        b, hidden = normal(torch, (s["experts"], s["outputs"], rank), 0.02), normal(torch, (rows, rank))
        return token, ends, x, dy, b, hidden

    def grouped():
        product = grouped_mm(torch)
        token, ends, x, dy, b, hidden = operands()

        def body():
            v = product(dy, b, offs=ends)
            return product(v.T, x[token], offs=ends), product(dy.T, hidden, offs=ends)
        return body

    def loop():
        token, ends, x, dy, b, hidden = operands()
        bounds = [0, *ends.tolist()]

        def body():
            sorted_x = x[token]
            results = []
            for e in range(s["experts"]):
                span = slice(bounds[e], bounds[e + 1])
                results.append(((dy[span] @ b[e]).T @ sorted_x[span], dy[span].T @ hidden[span]))
            return results
        return body
    yield "torch grouped_mm", grouped
    yield "loop over experts", loop


def backward_of(torch, output, inputs, gradient):
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def delta_operands(torch, s, gradient):
    keys, values = (1, s["tokens"], s["key_heads"], s["dim"]), (1, s["tokens"], s["value_heads"], s["dim"])
    unit = 1 / math.sqrt(s["dim"])
    q, k, v = normal(torch, keys, unit), normal(torch, keys, unit), normal(torch, values)
    g = torch.full(values[:3], -0.05, device=DEVICE)
    beta = torch.full(values[:3], 0.5, device=DEVICE).to(torch.bfloat16)
    inputs = [q, k, v, g, beta]
    for tensor in inputs:
        tensor.requires_grad_(gradient)
    return inputs


def delta_peers(torch, s, backward):
    length = s["tokens"] // s["documents"]

    def fla():
        ops = package("fla.ops.gated_delta_rule")
        q, k, v, g, beta = delta_operands(torch, s, backward)
        offsets = torch.arange(0, s["tokens"] + 1, length, device=DEVICE, dtype=torch.long)

        def forward():
            # Older versions want one key head for each value head.
            try:
                return ops.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=offsets)[0]
            except Exception:
                factor = s["value_heads"] // s["key_heads"]
                wide = [x.repeat_interleave(factor, dim=2) for x in (q, k)]
                return ops.chunk_gated_delta_rule(*wide, v, g, beta, cu_seqlens=offsets)[0]
        if not backward:
            return forward
        out = forward()
        return backward_of(torch, out, (q, k, v, g, beta), torch.randn_like(out))

    def transformers():
        module = package("transformers.models.qwen3_next.modeling_qwen3_next")
        factor = s["value_heads"] // s["key_heads"]
        q, k, v, g, beta = delta_operands(torch, s, backward)

        def forward():
            documents = [x.view(s["documents"], length, *x.shape[2:]) for x in (q, k, v, g, beta)]
            wide = [x.repeat_interleave(factor, dim=2) for x in documents[:2]]
            return module.torch_chunk_gated_delta_rule(*wide, documents[2], documents[3], documents[4])[0]
        if not backward:
            return forward
        out = forward()
        return backward_of(torch, out, (q, k, v, g, beta), torch.randn_like(out))
    yield "flash-linear-attention", fla
    yield "transformers torch_chunk_gated_delta_rule", transformers


def peers_delta(torch, s, case):
    yield from delta_peers(torch, s, False)


def peers_delta_backward(torch, s, case):
    yield from delta_peers(torch, s, True)


def convolution_peers(torch, s, backward):
    length, channels = s["tokens"] // s["documents"], s["channels"]
    kernel = 4

    def finish(x, forward):
        if not backward:
            return forward
        out = forward()
        return backward_of(torch, out, (x,), torch.randn_like(out))

    def causal_conv1d():
        function = package("causal_conv1d").causal_conv1d_fn
        x = normal(torch, (s["documents"], length, channels)).transpose(1, 2).requires_grad_(backward)
        weight = normal(torch, (channels, kernel), 0.5)
        return finish(x, lambda: function(x, weight, activation="silu"))

    def fla():
        function = package("fla.modules.convolution").causal_conv1d
        x = normal(torch, (1, s["tokens"], channels)).requires_grad_(backward)
        weight = normal(torch, (channels, kernel), 0.5)
        offsets = torch.arange(0, s["tokens"] + 1, length, device=DEVICE, dtype=torch.long)

        def forward():
            result = function(x, weight, activation="silu", cu_seqlens=offsets)
            return result[0] if isinstance(result, tuple) else result
        return finish(x, forward)

    def plain():
        functional = torch.nn.functional
        x = normal(torch, (s["documents"], channels, length)).requires_grad_(backward)
        weight = normal(torch, (channels, 1, kernel), 0.5)
        return finish(x, lambda: functional.silu(functional.conv1d(x, weight, padding=kernel - 1, groups=channels)[..., :length]))
    yield "causal-conv1d", causal_conv1d
    yield "flash-linear-attention convolution", fla
    yield "torch conv1d + silu", plain


def peers_convolution(torch, s, case):
    yield from convolution_peers(torch, s, False)


def peers_convolution_backward(torch, s, case):
    yield from convolution_peers(torch, s, True)


def peers_loss(torch, s, case):
    tokens, width, vocabulary = s["tokens"], s["width"], s["vocabulary"]

    def operands():
        x = normal(torch, (tokens, width)).requires_grad_(True)
        head = normal(torch, (vocabulary, width), 1 / math.sqrt(width))
        labels = torch.randint(vocabulary, (tokens,), device=DEVICE)
        return x, head, labels

    def with_gradient(x, loss):
        return lambda: torch.autograd.grad(loss(), x)

    def logits():
        x, head, labels = operands()
        return with_gradient(x, lambda: torch.nn.functional.cross_entropy((x @ head.T).float(), labels, reduction="sum"))

    def liger():
        function = package("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
        x, head, labels = operands()

        def loss():
            result = function.apply(x, head, labels)
            return result[0] if isinstance(result, tuple) else result
        return with_gradient(x, loss)

    def cut():
        function = package("cut_cross_entropy").linear_cross_entropy
        x, head, labels = operands()
        return with_gradient(x, lambda: function(x, head, labels, reduction="sum"))

    def floor():
        x, head, _ = operands()
        x = x.detach()
        gradient = normal(torch, (tokens, vocabulary))
        return lambda: (x @ head.T, gradient @ head)
    yield "torch logits + cross_entropy", logits
    yield "Liger fused linear cross-entropy", liger
    yield "cut-cross-entropy", cut
    yield "two cuBLAS products (a floor, no loss)", floor


def attention_peers(torch, s, backward):
    length = s["tokens"] // s["documents"]

    def sdpa(backend):
        def make():
            attention = package("torch.nn.attention")
            shape = lambda heads: (s["documents"], heads, length, s["dim"])
            q, k, v = (normal(torch, shape(heads)).requires_grad_(backward) for heads in (s["heads"], s["kv_heads"], s["kv_heads"]))

            def forward():
                with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if not backward:
                return forward
            out = forward()
            return backward_of(torch, out, (q, k, v), torch.randn_like(out))
        return make
    yield "torch SDPA, flash", sdpa("FLASH_ATTENTION")
    yield "torch SDPA, cuDNN", sdpa("CUDNN_ATTENTION")


def peers_attention(torch, s, case):
    yield from attention_peers(torch, s, False)


def peers_attention_backward(torch, s, case):
    yield from attention_peers(torch, s, True)


def peers_adamw(torch, s, case):
    def step(make):
        def made():
            parameter = torch.nn.Parameter(normal(torch, (s["elements"],), 0.02, torch.float32))
            parameter.grad = normal(torch, (s["elements"],), 0.01, torch.float32)
            return make(parameter).step
        return made
    yield "torch AdamW(fused)", step(lambda parameter: torch.optim.AdamW([parameter], lr=1e-4, fused=True))
    yield "bitsandbytes AdamW", step(lambda parameter: package("bitsandbytes").optim.AdamW([parameter], lr=1e-4))


def peers_adamw_8bit(torch, s, case):
    def step():
        parameter = torch.nn.Parameter(normal(torch, (s["elements"],), 0.02, torch.float32))
        parameter.grad = normal(torch, (s["elements"],), 0.01, torch.float32)
        return package("bitsandbytes").optim.AdamW8bit([parameter], lr=1e-4).step
    yield "bitsandbytes AdamW8bit", step


def peers_norm(torch, s, case):
    def plain():
        x, weight = normal(torch, (s["tokens"], s["width"])), normal(torch, (s["width"],))
        return lambda: torch.nn.functional.rms_norm(x, (s["width"],), weight, 1e-6)
    yield "torch rms_norm", plain


def peers_swiglu(torch, s, case):
    def plain():
        gate, up = normal(torch, (s["tokens"], s["width"])), normal(torch, (s["tokens"], s["width"]))
        return lambda: torch.nn.functional.silu(gate) * up

    def liger():
        function = package("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        gate, up = normal(torch, (s["tokens"], s["width"])), normal(torch, (s["tokens"], s["width"]))
        return lambda: function.apply(gate, up)
    yield "torch silu * up", plain
    yield "Liger SiLUMul", liger


PEERS = {
    "Copy": peers_copy, "Dequantize": peers_dequantize, "Quantize": peers_quantize, "Linear": peers_linear,
    "LinearInput": peers_linear_dx, "Experts": peers_experts, "Adamw8bit": peers_adamw_8bit, "Grouped": peers_grouped, "GroupedInput": peers_grouped_dx, "GroupedLora": peers_grouped_lora,
    "Delta": peers_delta, "DeltaBackward": peers_delta_backward, "Convolution": peers_convolution,
    "ConvolutionBackward": peers_convolution_backward, "Loss": peers_loss, "Attention": peers_attention,
    "AttentionBackward": peers_attention_backward, "Adamw": peers_adamw, "Norm": peers_norm, "Swiglu": peers_swiglu,
}


# What one kernel of a call must have in its name for the peer to have run as it is called; None where any will do.
FAST_PATHS = [
    (r"bitsandbytes matmul_4bit", r"gemm|gemv|dequant|4bit|nvjet|cutlass"),
    (r"bitsandbytes (de)?quantize|AdamW", r"quant|optimizer|adam"),
    (r"grouped_mm", r"group|cutlass|nvjet"),
    (r"grouped-nf4-gemm", r"nf4"),
    (r"flash-linear-attention convolution", r"conv"),
    (r"^flash-linear-attention$", r"chunk"),
    (r"causal-conv1d", r"causal_conv1d"),
    (r"SDPA, flash", r"flash|fmha"),
    (r"SDPA, cuDNN", r"cudnn|fprop|sdpa"),
    (r"Liger", r"liger|triton|_kernel"),
    (r"cut-cross-entropy", r"cce|cross_entropy|_kernel"),
]


def kernels_of(torch, body):
    """Names of the kernels one call runs, those with most time first; none where torch cannot profile the device."""
    activities = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[activities.CUDA, activities.CPU]) as profile:
            body()
            torch.cuda.synchronize()
    except RuntimeError:
        return []
    times = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0) + event.self_device_time_total
    return sorted(times, key=times.get, reverse=True)


def fast_path_missing(name, ran):
    """What a peer's name promises and no kernel of its call shows; None if all is well, or if nothing could be seen."""
    wanted = next((kernel for peer, kernel in FAST_PATHS if re.search(peer, name)), None)
    if not ran or wanted is None or any(re.search(wanted, kernel, re.IGNORECASE) for kernel in ran):
        return None
    return f"its fast path ({wanted}) did not run, but {', '.join(ran[:4])}"


# ---- measuring -------------------------------------------------------------------------------------------------------

def sizes(work):
    """`Linear { tokens: 64, nf4: true }` as ("Linear", {...})."""
    kind = work.split(" ", 1)[0]
    values = {name: {"true": True, "false": False}.get(text) if text in ("true", "false") else int(text)
              for name, text in re.findall(r"(\w+): (\w+)", work)}
    return kind, values


def measure(torch, body, calls, count):
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            body()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return times


def prepared(torch, case):
    """The peers of a case: (name, a call and how often between two events), or (name, why not)."""
    kind, values = sizes(case["work"])
    for name, make in PEERS[kind](torch, values, case):
        try:
            body = make()
            for _ in range(3):  # compiles, tunes, fills caches
                body()
            torch.cuda.synchronize()
            ran = kernels_of(torch, body)
            missing = fast_path_missing(name, ran)
            if missing:
                raise Absent(missing)
            single = measure(torch, body, 1, 1)[0]
            yield name, (body, max(1, min(200, math.ceil(1.0 / max(single, 1e-4)))), ran[:6])
        except Absent as reason:
            yield name, str(reason)
        except Exception as error:  # a peer that fails at this shape is told, and the others go on
            yield name, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def summary(times, case):
    ordered = sorted(times)
    at = lambda share: ordered[round((len(ordered) - 1) * share)]
    median = at(0.5)
    return {"median_ms": median, "p10_ms": at(0.1), "p90_ms": at(0.9), "count": len(ordered),
            "tflops": case["flops"] / median / 1e9, "gigabytes_per_second": case["bytes"] / median / 1e6}


def one_case(ours, torch, case):
    line = {"case": case["name"], "goal": case["goal"], "bytes": case["bytes"], "flops": case["flops"], "peers": {}}
    ready = ours.ask("prepare " + case["name"])
    running = {}
    if torch is None:
        line["peers"]["torch"] = {"absent": "torch is not installed or sees no GPU"}
    else:
        for name, found in prepared(torch, case):
            if isinstance(found, str):
                line["peers"][name] = {"absent": found}
            else:
                running[name] = (*found, [])
    own = []
    for _ in range(ROUNDS):
        if "ready" in ready:
            own += ours.ask(f"measure {PER_ROUND}")["milliseconds"]
        for body, calls, _, times in running.values():
            times += measure(torch, body, calls, PER_ROUND)
    line["ours"] = summary(own, case) if own else ready
    for name, (_, _, ran, times) in running.items():
        line["peers"][name] = dict(summary(times, case), kernels=ran)
    medians = {name: peer["median_ms"] for name, peer in line["peers"].items() if "median_ms" in peer}
    if own and medians:
        best = min(medians, key=medians.get)
        line["best_peer"], line["speedup"] = best, medians[best] / line["ours"]["median_ms"]
        line["speedups"] = {name: median / line["ours"]["median_ms"] for name, median in medians.items()}
    ours.ask("drop")
    line["check"] = ours.ask("check " + case["name"])["check"]
    running.clear()
    if torch is not None:
        torch.cuda.empty_cache()
    return line


def find_torch():
    try:
        torch = package("torch")
    except Absent:
        return None
    return torch if torch.cuda.is_available() else None


def versions(torch):
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "bitsandbytes", "transformers", "fla", "liger_kernel", "cut_cross_entropy", "causal_conv1d",
                 "nf4_grouped", "peft", "unsloth"):
        try:
            found[name] = getattr(package(name), "__version__", "present")
        except Absent:
            found[name] = "absent"
    if torch is not None:
        found["cuda"] = torch.version.cuda
    return found


def clocks():
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
        return done.stdout.strip()
    except OSError as error:
        return str(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="the bench program")
    parser.add_argument("--out", required=True, help="folder for bench.jsonl")
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--seconds", type=float, default=540, help="no case is begun after so long")
    parser.add_argument("--bench-argument", action="append", default=[], help="handed to the bench program")
    arguments = parser.parse_args()
    os.makedirs(arguments.out, exist_ok=True)
    begin = time.monotonic()
    torch = find_torch()
    ours = Ours(arguments.bench, arguments.bench_argument)
    left_out = []
    with open(os.path.join(arguments.out, "bench.jsonl"), "w", encoding="utf-8") as file:
        def say(line):
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)
        say({"machine": ours.ask("describe"), "versions": versions(torch), "clocks": clocks()})
        for case in ours.ask("list")["cases"]:
            if arguments.only not in case["name"]:
                continue
            if time.monotonic() - begin > arguments.seconds:
                left_out.append(case["name"])
                continue
            say(one_case(ours, torch, case))
        say({"left_out_for_time": left_out, "clocks": clocks()})
    ours.end()


DEVICE = "cuda"

if __name__ == "__main__":
    main()
