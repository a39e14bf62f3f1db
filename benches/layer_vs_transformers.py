#!/usr/bin/env python3
"""One Qwen3-Next layer at the real width, forward and backward, beside transformers' own layer, interleaved in one run.

    python -m venv .venv && .venv/bin/pip install torch transformers
    cargo build --release -p brightrun-worker --benches
    .venv/bin/python benches/layer_vs_transformers.py [--tokens 256] [--rounds 3] [--passes 5] [--quick] [--out FILE]

Two subjects: the mixture of experts with its router and shared expert, and the whole layer with Gated DeltaNet and norms. Width 2048,
512 experts of 512, top 10. Weights are frozen, random and without adapters; the gradient goes to the input. Both sides use two threads.
A round runs every side once, each in a process of its own, best of `--passes` passes there (ours of five); reported are the median over rounds and all
rounds. Times are busy time (processor time divided by threads): on a shared machine wall time, given too, says more about the others.
The peer runs in float32 and bfloat16 with each of its implementations of the experts; ratios are against its best of the same
arithmetic. Writes one JSON object.
"""
import argparse, json, os, re, statistics, subprocess, sys, time

PEER = r"""
import json, sys, time, torch
from transformers.models.qwen3_next import configuration_qwen3_next as c, modeling_qwen3_next as m
torch.set_num_threads(2)
dtype, implementation, tokens, passes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)

def best(forward, dy):
    least = [1e9] * 4
    for _ in range(passes + 1):
        marks = [(time.process_time() / 2, time.perf_counter())]
        y = forward(); marks.append((time.process_time() / 2, time.perf_counter()))
        y.backward(dy); marks.append((time.process_time() / 2, time.perf_counter()))
        spans = [marks[i + 1][j] - marks[i][j] for i in (0, 1) for j in (0, 1)]
        least = [min(a, b) for a, b in zip(least, spans)]
    names = ["forward_busy", "forward_wall", "backward_busy", "backward_wall"]
    return {name: round(1e3 * value, 2) for name, value in zip(names, least)}

config = c.Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"], decoder_sparse_step=1, mlp_only_layers=[])
config._experts_implementation = implementation
config._attn_implementation = "sdpa"
assert (config.hidden_size, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (2048, 512, 10, 512)
torch.set_default_dtype(getattr(torch, dtype))
with torch.device("meta"):
    layer = m.Qwen3NextDecoderLayer(config, 0)
layer = layer.to_empty(device="cpu")
noise = torch.randn(1 << 22) * 0.02
for parameter in layer.parameters():
    parameter.requires_grad_(False)
    for part in parameter.view(-1).split(noise.numel()):
        part.copy_(noise[: part.numel()])
x = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
dy = torch.randn_like(x)
def block():
    y = layer.mlp(x)
    return y[0] if isinstance(y, tuple) else y
def whole():
    y = layer(x, position_embeddings=None)
    return y[0] if isinstance(y, tuple) else y
print(json.dumps({"moe block": best(block, dy), "layer": best(whole, dy)}))
"""

PEERS = [(dtype, kind) for dtype in ("float32", "bfloat16") for kind in ("eager", "grouped_mm")]
QUICK = [("float32", "eager"), ("bfloat16", "grouped_mm")]
OURS = {"f32": "float32", "bf16": "bfloat16", "nf4": "bfloat16"}


def peer(dtype, implementation, tokens, passes):
    command = [sys.executable, "-c", PEER, dtype, implementation, str(tokens), str(passes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(name, tokens, binary):
    command = [binary] if binary else ["cargo", "bench", "-p", "brightrun-worker", "--bench", "layer", "--"]
    command += [str(tokens), name]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    pattern = rf"^(moe block|layer) {name} (forward|backward) +([\d.]+) ms busy +([\d.]+) ms wall"
    for subject, way, busy, wall in re.findall(pattern, text, re.M):
        found.setdefault(subject, {}).update({f"{way}_busy": float(busy), f"{way}_wall": float(wall)})
    return found


def rounds_of(sides, name):
    return sides.get(f"brightrun {name}", [])


def median(rounds, subject):
    sums = [sum(one[subject][f"{way}_busy"] for way in ("forward", "backward")) for one in rounds if subject in one]
    return statistics.median(sums) if sums else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the implementation that is best in each arithmetic at 256 tokens")
    parser.add_argument("--binary", help="the built bench, instead of `cargo bench`")
    parser.add_argument("--out")
    options = parser.parse_args()
    sides = {}
    loads = []
    for _ in range(options.rounds):
        loads.append(os.getloadavg()[0])
        for dtype, kind in QUICK if options.quick else PEERS:
            sides.setdefault(f"transformers {dtype} {kind}", []).append(peer(dtype, kind, options.tokens, options.passes))
            for name in (name for name, arithmetic in OURS.items() if arithmetic == dtype and len(rounds_of(sides, name)) < len(loads)):
                sides.setdefault(f"brightrun {name}", []).append(ours(name, options.tokens, options.binary))
    report = {"date": time.strftime("%Y-%m-%d"), "tokens": options.tokens, "unit": "milliseconds", "load_before_round": loads,
              "rounds": sides, "median_forward_and_backward_busy": {}, "times_faster": {}}
    for subject in ("moe block", "layer"):
        medians = {side: median(rounds, subject) for side, rounds in sides.items()}
        report["median_forward_and_backward_busy"][subject] = medians
        for name, dtype in OURS.items():
            best = min(value for side, value in medians.items() if side.startswith(f"transformers {dtype}") and value)
            report["times_faster"][f"{subject}, {name} / best {dtype} peer"] = round(best / medians[f"brightrun {name}"], 2)
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


main()
