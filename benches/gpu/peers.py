#!/usr/bin/env python3
"""The GPU bench beside its peers: bitsandbytes, torch, PEFT, flash-linear-attention, Liger, and what transformers does by default.

    cargo build --release -p brightrun-kernels --bench gpu
    python benches/gpu/peers.py --bench target/release/deps/gpu-… --out FOLDER [--only K5,K7] [--seconds 500]

All sides run in turns on one GPU (A B C A B C …), each timed by the device's own events over the same number of calls; a process waits
while the other measures. Warm-up and compilation are apart. A peer whose package is missing is named as absent, and so is one whose
fast path did not run: the kernels of one call are read from a profile and written beside its times. Every side's results are compared
with float32 on its own operands in the same run, ours too, and a timing without that, or with results that are off, does not count:
`goals.py` says what counts. Where a case is a share of another (of a copy) or adds to it (an adapter), that one is measured in the same
turns. Writes one JSON line for each case to FOLDER/bench.jsonl: shapes, median and 10-90% of each side, achieved TFLOP/s and GB/s,
working memory, numerics, kernels, clocks and power limit.

--bench may also be a Unix socket at which a bench answers already. What peers do is in `peer/`, a function for each op.
"""
import argparse
import json
import math
import os
import re
import socket
import stat
import subprocess
import sys
import time

import peer
from peer import Absent, differences, experts, layers, loss, memory, mixers, package

ROUNDS = 5
PER_ROUND = 4
# Elements whose NF4 codes are compared with bitsandbytes' own, and so many in a trial.
CODES, TRIAL_CODES = 1 << 22, 1 << 14

PEERS = {
    "Copy": memory.copy, "Dequantize": memory.dequantize, "Quantize": memory.quantize, "QuantizeFp8": memory.quantize_fp8,
    "Linear": layers.linear, "LinearInput": layers.linear_dx,
    "Grouped": experts.grouped, "GroupedInput": experts.grouped_dx, "GroupedLora": experts.grouped_lora, "Experts": experts.experts,
    "Delta": mixers.delta, "DeltaBackward": mixers.delta_backward, "DeltaInputs": mixers.delta_inputs,
    "ConvolutionBackward": mixers.convolution_backward, "Attention": mixers.attention, "AttentionBackward": mixers.attention_backward,
    "Loss": loss.loss, "Adamw": memory.adamw, "Adamw8bit": memory.adamw_8bit, "Norm": memory.norm, "Swiglu": memory.swiglu,
}

# What one kernel of a call must have in its name for the peer to have run as it is called; a peer not named here may run as it likes.
FAST_PATHS = [
    (r"bitsandbytes matmul_4bit", r"gemm|gemv|dequant|4bit|nvjet|cutlass"),
    (r"bitsandbytes (de)?quantize|AdamW", r"quant|optimizer|adam"),
    (r"Linear4bit", r"quant|4bit|gemm"),
    (r"grouped_mm", r"group|cutlass|nvjet"),
    (r"grouped-nf4-gemm", r"nf4"),
    (r"flash-linear-attention convolution", r"conv"),
    (r"^flash-linear-attention$", r"chunk"),
    (r"causal-conv1d", r"causal_conv1d"),
    (r"SDPA, flash", r"flash|fmha"),
    (r"SDPA, cuDNN", r"cudnn|fprop|bprop|sdpa"),
    (r"Liger", r"liger|triton|_kernel"),
    (r"cut-cross-entropy", r"cce|cross_entropy|_kernel"),
]


# ---- ours ------------------------------------------------------------------------------------------------------------

class Ours:
    """The bench, answering a JSON line for each line."""

    def __init__(self, program, more):
        self.process = self.socket = None
        if os.path.exists(program) and stat.S_ISSOCK(os.stat(program).st_mode):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(program)
            stream = self.socket.makefile("rw", encoding="utf-8")
            self.questions = self.answers = stream
        else:
            words = [program, "--serve", *more]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.questions, self.answers = self.process.stdin, self.process.stdout

    def ask(self, line):
        try:
            self.questions.write(line + "\n")
            self.questions.flush()
            answer = self.answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.process.wait() if self.process else "unknown"
            raise SystemExit(f"the bench ended at `{line}` with status {status}")
        return json.loads(answer)

    def end(self):
        self.questions.close()
        if self.process:
            self.process.wait(timeout=60)
        else:
            self.socket.close()


# ---- measuring -------------------------------------------------------------------------------------------------------

def sizes(work):
    """`Linear(Layer { tokens: 64, nf4: true })` as ("Linear", {...})."""
    words = {"true": True, "false": False}
    found = {name: words[text] if text in words else int(text) for name, text in re.findall(r"(\w+): (\d+|true|false)", work)}
    return re.match(r"\w+", work).group(), found


def wait(torch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(torch, body, calls):
    """Of one call, by the device's own clock; by the host's where there is no device."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(calls):
            body()
        return 1e3 * (time.perf_counter() - begin) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        body()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def kernels_of(torch, body):
    """Names of the kernels one call runs, those with most time first; none where torch cannot profile the device."""
    if not torch.cuda.is_available():
        return []
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
    wanted = next((kernel for peer_name, kernel in FAST_PATHS if re.search(peer_name, name)), None)
    if not ran or wanted is None or any(re.search(wanted, kernel, re.IGNORECASE) for kernel in ran):
        return None
    return f"its fast path ({wanted}) did not run, but {', '.join(ran[:4])}"


def working_bytes(torch, body):
    """The most memory that a call has beside its operands."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    body()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Side:
    """One side of a comparison: how to measure it, what it has measured, what is told of it."""

    def __init__(self, measure, told):
        self.measure, self.told, self.times = measure, told, []


def first_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def peer_sides(torch, case):
    """(name, Side) of each peer, or (name, why there is none)."""
    if torch is None:
        yield "torch", "torch is not installed or sees no GPU"
        return
    kind, values = sizes(case["work"])
    for name, make in PEERS[kind](torch, values, case):
        try:
            yield name, peer_side(torch, name, make)
        except Absent as reason:
            yield name, str(reason)
        except Exception as error:  # a peer that fails at this shape is told, and the others go on
            yield name, first_line(error)


def peer_side(torch, name, make):
    body, pairs = make()
    for _ in range(3):  # compiles, tunes, fills caches
        body()
    wait(torch)
    ran = kernels_of(torch, body)
    missing = fast_path_missing(name, ran)
    if missing:
        raise Absent(missing)
    told = {"kernels": ran[:6], "working_bytes": working_bytes(torch, body), "check": differences(torch, pairs())}
    calls = max(1, min(200, math.ceil(1.0 / max(milliseconds(torch, body, 1), 1e-4))))
    return Side(lambda count: [milliseconds(torch, body, calls) for _ in range(count)], dict(told, calls=calls))


def our_side(ours, name):
    ready = ours.ask("prepare " + name)
    if "ready" not in ready:
        return ready["absent"]
    told = {"calls": ready["calls"], "working_bytes": ready["working_bytes"]}
    return Side(lambda count: ours.ask(f"measure {count} {name}")["milliseconds"], told)


def summary(times, case):
    ordered = sorted(times)
    at = lambda share: ordered[round((len(ordered) - 1) * share)]
    median = at(0.5)
    return {"median_ms": median, "p10_ms": at(0.1), "p90_ms": at(0.9), "count": len(ordered),
            "tflops": case["flops"] / median / 1e9, "gigabytes_per_second": case["bytes"] / median / 1e6}


def one_case(ours, torch, case, other):
    """One line of results; `other` is the case beside it, if there is one."""
    line = {"case": case["name"], "goal": case["goal"], "bytes": case["bytes"], "flops": case["flops"], "peers": {}}
    sides = {"ours": our_side(ours, case["name"])}
    if other is not None:
        sides["beside"] = our_side(ours, other["name"])
    sides.update((("peer", name), side) for name, side in peer_sides(torch, case))
    running = {key: side for key, side in sides.items() if isinstance(side, Side)}
    for _ in range(ROUNDS):
        for side in running.values():
            side.times += side.measure(PER_ROUND)
    for key, side in sides.items():
        of = other if key == "beside" else case
        told = dict(summary(side.times, of), **side.told) if isinstance(side, Side) else {"absent": side}
        if isinstance(key, tuple):
            line["peers"][key[1]] = told
        else:
            line[key] = dict(told, case=of["name"])
    line["clocks"] = clocks()
    ours.ask("drop")
    line["ours"]["check"] = ours.ask("check " + case["name"])["check"]
    compare(line)
    sides.clear()
    running.clear()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return line


def compare(line):
    """How many times faster ours is than each peer, and the best of them."""
    own = line["ours"].get("median_ms")
    medians = {name: told["median_ms"] for name, told in line["peers"].items() if "median_ms" in told}
    if not own or not medians:
        return
    line["best_peer"] = min(medians, key=medians.get)
    line["speedups"] = {name: median / own for name, median in medians.items()}


def compared_codes(ours, torch):
    """Q4: the codes and scales of one matrix, ours and bitsandbytes' on the same device."""
    elements = CODES if peer.DEVICE[0] == "cuda" else TRIAL_CODES
    line = {"codes": elements, "ours": ours.ask(f"codes {elements}")}
    try:
        line["bitsandbytes"] = memory.nf4_digests(torch, elements)
        line["equal"] = line["ours"] == line["bitsandbytes"]
    except Absent as reason:
        line["bitsandbytes"] = {"absent": str(reason)}
    except Exception as error:
        line["bitsandbytes"] = {"absent": first_line(error)}
    return line


def find_torch():
    """torch, if it is there and sees the device that peers are to run on."""
    try:
        torch = package("torch")
    except Absent:
        return None
    return torch if peer.DEVICE[0] == "cpu" or torch.cuda.is_available() else None


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
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
        return done.stdout.strip()
    except OSError as error:
        return str(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="the bench program, or the socket of one")
    parser.add_argument("--out", required=True, help="folder for bench.jsonl")
    parser.add_argument("--only", default="", help="goals, or how names of cases begin, with commas between")
    parser.add_argument("--seconds", type=float, default=540, help="no case is begun after so long")
    parser.add_argument("--peer-device", default="cuda", help="where peers run; cpu tries them out where there is no GPU")
    parser.add_argument("--bench-argument", action="append", default=[], help="handed to the bench program")
    arguments = parser.parse_args()
    os.makedirs(arguments.out, exist_ok=True)
    begin = time.monotonic()
    peer.DEVICE[0] = arguments.peer_device
    torch = find_torch()
    ours = Ours(arguments.bench, arguments.bench_argument)
    wanted, left_out = arguments.only.split(","), []
    with open(os.path.join(arguments.out, "bench.jsonl"), "w", encoding="utf-8") as file:
        def say(line):
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)
        machine = ours.ask("describe")
        say({"machine": machine, "versions": versions(torch), "clocks": clocks()})
        if "absent" in machine:
            raise SystemExit(f"the bench has no device: {machine['absent']}")
        say(compared_codes(ours, torch))
        cases = {case["name"]: case for case in ours.ask("list")["cases"]}
        for name, case in cases.items():
            if not any(name.startswith(word + " ") or name == word or not word for word in wanted):
                continue
            if time.monotonic() - begin > arguments.seconds:
                left_out.append(name)
                continue
            say(one_case(ours, torch, case, cases.get(case["beside"])))
        say({"left_out_for_time": left_out, "clocks": clocks()})
    ours.end()


if __name__ == "__main__":
    main()
