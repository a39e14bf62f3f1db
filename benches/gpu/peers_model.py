#!/usr/bin/env python3
"""Whole training steps beside their peers: the first layers of Qwen3-Next-80B-A3B, ours and transformers + PEFT.

    python benches/gpu/peers_model.py --program brightrun --config qwen3-next-80b-a3b.json --out FOLDER [--seconds 500]

  E1  one layer (delta rule, 512 experts), 4096 tokens
  E2  four layers (three of the delta rule, one of attention), 4096 tokens; peers with bf16 resident, and with experts in NF4 of
      bitsandbytes that are decoded as a whole for each pass, the usual way
  E3  the same four layers with adapters of the routed experts too, beside experts4bit-qlora with its fused training kernels, whose
      best setting is made for that; Unsloth is named where it is installed

A step is forward, recomputation, backward, clipping and AdamW over LoRA of rank 16 on the same projections, one document, with the
routers' choice as random weights make it. Both sides run in turns (A B A B …) on one GPU, the other one waiting. Peers have
transformers' fastest experts and, where it is installed, flash-linear-attention; which kernels really ran is read
from a profile, written beside the times, and what is missing is said. A JSON line for each comparison goes to FOLDER/model-peers.jsonl.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time

import peer
from peer import Absent, package, quantised
from peers import clocks, find_torch, first_line, kernels_of, versions

ROUNDS, PER_ROUND, WARM_UP = 5, 4, 3
TOKENS = 4096
RANK = 16
GOALS = {"E1": 1, "E2": 4, "E3": 4}
# Ours by the names of its command line, theirs by PEFT's; routed experts have adapters in E3 only.
DELTA = ["in_proj_qkvz", "in_proj_ba", "out_proj"]
TARGETS = {
    # The first layer has no attention, and ours refuses a target that matches nothing.
    "E1": DELTA,
    "E2": ["q_proj", "k_proj", "v_proj", "o_proj", *DELTA],
    "E3": ["q_proj", "k_proj", "v_proj", "o_proj", *DELTA, "experts"],
}
# Kernels of which one must have run for a fast path to count as active.
FAST = {
    "flash-linear-attention": ("chunk_gated_delta", "chunk_delta", "chunk_fwd", "chunk_bwd"),
    "grouped products": ("grouped", "group_gemm", "GroupProblem", "cutlass"),
}


class Ours:
    """The program, answering a number of steps with their milliseconds."""

    def __init__(self, program, config, layers, device, targets):
        words = [program, "--device", device, "bench", "--serve", "--model", config, "--layers", str(layers), "--tokens", str(TOKENS),
                 "--documents", "1", "--rank", str(RANK), "--targets", ",".join(targets), "--base-dtype", "nf4-experts",
                 "--adapter-budget-bytes", str(64 << 30)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loss = self.answer()["loss"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise Absent(f"the program ended with status {self.process.wait()}")
        return json.loads(line)

    def steps(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.answer()["milliseconds"]

    def end(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def build(torch, config_file, layers, experts):
    """The first layers of the model in bf16 with random weights."""
    transformers = package("transformers")
    with open(config_file, encoding="utf-8") as file:
        values = json.load(file)
    values.pop("quantization_config", None)
    values.update(num_hidden_layers=layers)
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    config = transformers.Qwen3NextConfig(**values)
    config._experts_implementation = experts
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return transformers.Qwen3NextForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def decode_experts_each_pass(torch, model):
    """Experts in bitsandbytes' NF4, decoded as a whole in front of each use and kept by nobody but the backward pass that needs them."""
    functional = package("bitsandbytes.functional")

    def wrap(own):
        kept = {}
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(own, name).data
            kept[name] = (*quantised(torch, weight.view(-1, weight.shape[-1])), weight.shape)
            del own._parameters[name]
        plain = own.forward

        def forward(*inputs, **named):
            for name, (codes, state, shape) in kept.items():
                setattr(own, name, functional.dequantize_4bit(codes, state).view(shape))
            try:
                return plain(*inputs, **named)
            finally:
                for name in kept:
                    delattr(own, name)
        own.forward = forward
    for layer in model.model.layers:
        wrap(layer.mlp.experts)
    return model


def experts4bit(torch, model):
    """experts4bit-qlora's best setting: adapters of its experts, both passes in fused kernels."""
    e4b = package("experts4bit_qlora")
    for layer in model.model.layers:
        own = layer.mlp.experts
        frozen = e4b.Experts4bit.from_float(own.gate_up_proj.data, own.down_proj.data, compute_dtype=torch.bfloat16)
        layer.mlp.experts = e4b.ExpertsLoRA(frozen, r=RANK, alpha=2 * RANK, dtype=torch.bfloat16).to(own.gate_up_proj.device)
    patched = e4b.enable_fast_train(model, dgrad=True)
    if patched != len(model.model.layers):
        raise Absent(f"its fused kernels took {patched} of {len(model.model.layers)} layers")
    return model


def step_of(torch, model, targets):
    """A call that does one step of transformers + PEFT; it gives the loss."""
    peft = package("peft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    own = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[name for name in targets if name in present and name != "experts"])
    vocabulary = model.config.vocab_size
    model = peft.get_peft_model(model, lora).train()
    for parameter in own:  # adapters that PEFT did not make
        parameter.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")

    def step():
        ids = torch.randint(vocabulary, (1, TOKENS), device=device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits, as ours does
    return step


def peers(torch, goal, config, layers):
    made = lambda experts, change=None: lambda: step_of(
        torch, (change or (lambda _, model: model))(torch, build(torch, config, layers, experts)), TARGETS[goal])
    if goal == "E3":
        yield "experts4bit-qlora, fused training (E3)", made("eager", experts4bit)
        yield "unsloth (E3)", lambda: installed_only("unsloth")
        return
    for experts in ("grouped_mm", "eager"):
        yield f"transformers + PEFT, {experts} experts, bf16", made(experts)
    if goal == "E2":
        yield "transformers + PEFT, NF4 experts decoded for each pass", made("grouped_mm", decode_experts_each_pass)


def installed_only(name):
    package(name)
    raise Absent(f"{name} is installed, but has no recipe for layers cut out of Qwen3-Next: run its own benchmark beside this one")


def prepared(torch, goal, config, layers):
    for name, make in peers(torch, goal, config, layers):
        try:
            step = make()
            losses = [step() for _ in range(WARM_UP)]
            ran = kernels_of(torch, step)
            fast = {path: any(mark in kernel for kernel in ran for mark in marks) for path, marks in FAST.items()}
            yield name, {"step": step, "loss": losses[-1], "kernels": ran[:8], "fast_paths": fast}
        except Absent as reason:
            yield name, {"absent": str(reason)}
        except Exception as error:  # a peer that fails here is told, and the others go on
            yield name, {"absent": first_line(error)}


def summary(times):
    ordered = sorted(times)
    at = lambda share: ordered[round((len(ordered) - 1) * share)]
    return {"median_ms": at(0.5), "p10_ms": at(0.1), "p90_ms": at(0.9), "count": len(ordered),
            "tokens_per_second": TOKENS / at(0.5) * 1e3}


def timed(step):
    begin = time.monotonic()
    step()
    return 1e3 * (time.monotonic() - begin)


def compare(arguments, torch, goal, layers):
    """One comparison. Peers come one after the other, since two models of this width do not fit beside each other for long."""
    targets = TARGETS[goal]
    line = {"goal": goal, "layers": layers, "tokens": TOKENS, "rank": RANK, "targets": targets, "peers": {}}
    try:
        ours = Ours(arguments.program, arguments.model, layers, arguments.device, targets)
    except Absent as reason:
        line["ours"] = {"absent": str(reason)}
        return line
    own, expected = [], None
    candidates = [("torch", {"absent": "torch is not installed or sees no GPU"})] if torch is None else \
        prepared(torch, goal, arguments.config, layers)
    for name, found in candidates:
        step = found.pop("step", None)
        times = []
        for _ in range(ROUNDS if step else 0):
            own += ours.steps(PER_ROUND)
            times += [timed(step) for _ in range(PER_ROUND)]
        if times:
            found.update(summary(times))
            found["is_sane"] = math.isfinite(found["loss"])
        line["peers"][name] = found
        del step
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
    own = own or ours.steps(ROUNDS * PER_ROUND)
    line["ours"] = dict(summary(own), loss=ours.loss, is_sane=math.isfinite(ours.loss))
    ours.end()
    for found in line["peers"].values():
        if "median_ms" in found:
            found["speedup_of_ours"] = found["median_ms"] / line["ours"]["median_ms"]
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="brightrun")
    parser.add_argument("--model", default="qwen3-next-80b-a3b", help="the preset that ours builds")
    parser.add_argument("--config", required=True, help="the same model's config.json, for transformers")
    parser.add_argument("--device", default="cuda", help="ours: another one tries this file out where there is no GPU")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--goals", default=",".join(GOALS))
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=540, help="no comparison is begun after so long")
    arguments = parser.parse_args()
    globals()["TOKENS"] = arguments.tokens
    os.makedirs(arguments.out, exist_ok=True)
    peer.DEVICE[0] = "cpu" if arguments.device in ("cpu", "emulated") else "cuda"
    begin, torch = time.monotonic(), find_torch()
    with open(os.path.join(arguments.out, "model-peers.jsonl"), "w", encoding="utf-8") as file:
        def say(line):
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)
        say({"versions": versions(torch), "clocks": clocks()})
        for goal, layers in GOALS.items():
            if goal not in arguments.goals.split(","):
                continue
            if time.monotonic() - begin > arguments.seconds:
                say({"goal": goal, "left_out": "there was no time left"})
                continue
            say(compare(arguments, torch, goal, layers))


if __name__ == "__main__":
    main()
