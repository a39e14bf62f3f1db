#!/usr/bin/env python3
"""The routed experts and the delta rule of one Qwen3-Next layer at the real width, beside transformers, in one run.

    python -m venv .venv && .venv/bin/pip install torch transformers
    .venv/bin/python benches/experts_vs_transformers.py [--tokens 256] [--out FILE]

Width 2048, 512 experts of 512, top 10; 16 key and 32 value heads of 128. Weights are frozen; gradients go to the input and to the
routing weights. Both sides use two threads. Times are busy time, that is processor time divided by threads, the best of five:
on a shared machine wall time, given too, says more about the others. The peer runs in float32 and in bfloat16, with each of its
implementations of the experts; the best counts. Writes one JSON object.
"""
import argparse, json, os, re, subprocess, sys, time

PEER = r"""
import json, sys, time, torch
from transformers.models.qwen3_next import configuration_qwen3_next as c, modeling_qwen3_next as m
torch.set_num_threads(2)
dtype, implementation, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)

def best(forward, dy):
    least = [1e9] * 4
    for _ in range(6):
        marks = [(time.process_time() / 2, time.perf_counter())]
        y = forward(); marks.append((time.process_time() / 2, time.perf_counter()))
        y.backward(dy); marks.append((time.process_time() / 2, time.perf_counter()))
        spans = [marks[i + 1][j] - marks[i][j] for i in (0, 1) for j in (0, 1)]
        least = [min(a, b) for a, b in zip(least, spans)]
    names = ["forward_busy", "forward_wall", "backward_busy", "backward_wall"]
    return {name: round(1e3 * value, 2) for name, value in zip(names, least)}

if implementation == "delta":
    q, k = (torch.randn(1, tokens, 16, 128, requires_grad=True) for _ in range(2))
    v = torch.randn(1, tokens, 32, 128, requires_grad=True)
    g = torch.full((1, tokens, 32), -0.05, requires_grad=True)
    beta = torch.full((1, tokens, 32), 0.5, requires_grad=True)
    run = lambda: m.torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
    print(json.dumps(best(run, torch.randn(1, tokens, 32, 128))))
    sys.exit()
config = c.Qwen3NextConfig(num_hidden_layers=1)
config._experts_implementation = implementation
torch.set_default_dtype(getattr(torch, dtype))
with torch.device("meta"):
    experts = m.Qwen3NextExperts(config)
experts = experts.to_empty(device="cpu")
noise = torch.randn(1 << 22) * 0.02
for parameter in experts.parameters():
    parameter.requires_grad_(False)
    for part in parameter.view(-1).split(noise.numel()):
        part.copy_(noise[: part.numel()])
x = torch.randn(tokens, config.hidden_size, requires_grad=True)
weights, chosen = torch.randn(tokens, config.num_experts).softmax(-1).topk(config.num_experts_per_tok)
weights = weights.detach().requires_grad_()
print(json.dumps(best(lambda: experts(x, chosen, weights), torch.randn_like(x))))
"""


def peer(dtype, implementation, tokens):
    command = [sys.executable, "-c", PEER, dtype, implementation, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "failed"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(tokens):
    command = ["cargo", "bench", "-p", "brightrun-kernels", "--bench", "experts", "--", str(tokens)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, way, busy, wall in re.findall(r"^(.*) (forward|backward) +([\d.]+) ms busy +([\d.]+) ms wall", text, re.M):
        found.setdefault(name, {}).update({f"{way}_busy": float(busy), f"{way}_wall": float(wall)})
    return found


def total(times):
    return times["forward_busy"] + times["backward_busy"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out")
    options = parser.parse_args()
    implementations = ["eager", "grouped_mm"]
    report = {"date": time.strftime("%Y-%m-%d"), "tokens": options.tokens, "unit": "milliseconds", "peer": {}}
    for dtype in ("float32", "bfloat16"):
        for implementation in implementations:
            report["peer"][f"experts {dtype} {implementation}"] = peer(dtype, implementation, options.tokens)
    report["peer"]["delta rule"] = peer("float32", "delta", options.tokens)
    report["ours"] = ours(options.tokens)
    best_of = lambda prefix: min(
        total(times) for name, times in report["peer"].items() if name.startswith(prefix) and "error" not in times
    )
    pick = lambda *words: next(times for name, times in report["ours"].items() if all(word in name for word in words))
    report["times_faster"] = {
        "experts, f32 products, bf16 weights / best float32 peer": best_of("experts float32") / total(pick("bf16 F32")),
        "experts, bf16 products and weights / best bfloat16 peer": best_of("experts bfloat16") / total(pick("bf16 Bf16")),
        "experts, bf16 products, NF4 weights / best bfloat16 peer": best_of("experts bfloat16") / total(pick("nf4-nested")),
        "delta rule": best_of("delta rule") / total(pick("delta rule")),
    }
    report["times_faster"] = {name: round(value, 2) for name, value in report["times_faster"].items()}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


main()
