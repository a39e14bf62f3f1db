#!/usr/bin/env python3
"""The goals, and what a run of `gpu-check` says of each: reached as a moonshot, passed, missed, or not measured and why.

    python benches/gpu/goals.py FOLDER/results.jsonl     the table of a run
    python benches/gpu/goals.py --page                   which command measures which goal, as docs/reference/performance.md has it

A goal's figure is a ratio of two sides of one run where it can be. A timing counts only if the results of both sides were compared with
float32 in the same run and are near it.
"""
import json
import re
import sys

from peer.experts import GROUPED_NF4
from peer.layers import WITHOUT
from peer.loss import FLOOR

# Mean difference from float32, over its root mean square, up to which a timing counts. bf16 keeps 8 bits, so factors are off by 2^-9 at
# most; a chain of products and a gradient of one lose a few times that. Moments in 8 bits lose more, on every side.
NEAR = 0.02
NEAR_8BIT = 0.1
# What one H200 does in bf16 on random data, which true MFU is a share of.
PEAK_TFLOPS = 790
GIB = 2 ** 30

MOONSHOT, PASS, MISSED, BELOW, TOLD, UNKNOWN = "moonshot", "pass", "missed", "below the moonshot", "no bound", "not measured"
COMMAND = "scripts/gpu-check run PACK --out DIR --only "


class Row:
    """One figure of a goal. `least` is what passes and `best` the moonshot; a goal may have only one of them."""

    def __init__(self, goal, what, value, least, best, is_share_of_less=False, note=""):
        self.goal, self.what, self.least, self.best, self.note = goal, what, least, best, note
        self.value, self.smaller_is_better = value, is_share_of_less
        self.reason = None if isinstance(value, (int, float)) and value == value else str(value)

    def reaches(self, bound):
        return bound is not None and (self.value <= bound if self.smaller_is_better else self.value >= bound)

    @property
    def verdict(self):
        if self.reason is not None:
            return UNKNOWN
        if self.reaches(self.best):
            return MOONSHOT
        if self.least is None:
            return BELOW if self.best is not None else TOLD
        return PASS if self.reaches(self.least) else MISSED

    def as_json(self):
        return {"goal": self.goal, "what": self.what, "value": None if self.reason else self.value, "pass": self.least,
                "moonshot": self.best, "smaller_is_better": self.smaller_is_better, "verdict": self.verdict,
                "note": self.reason or self.note}


# ---- reading a run ---------------------------------------------------------------------------------------------------

class Results:
    """The lines of a run, by what they are of."""

    def __init__(self, lines):
        self.lines = lines
        self.cases = {line["case"]: line for line in lines if "case" in line and "ours" in line}
        self.left_out = [name for line in lines for name in line.get("left_out_for_time", [])]

    def of(self, goal, op):
        """Measured cases of a goal and an op."""
        return [line for name, line in self.cases.items() if name.startswith(f"{goal} {op} ")]

    def having(self, key):
        return [line for line in self.lines if key in line]

    def why_not(self, goal):
        if any(name.startswith(goal + " ") for name in self.left_out):
            return "no time was left"
        parts = GOALS[goal][1].split(",")
        problems = [f"{line['part']}: {line['problem']}" for line in self.having("part") if line["part"] in parts and line["problem"]]
        return problems[-1] if problems else "its part did not run"


def counts(told, case):
    """The median of a side in milliseconds, or why it does not count."""
    if told is None:
        return "absent"
    if "absent" in told:
        return told["absent"]
    check = told.get("check")
    if not check or check.get("mean") is None:
        return "its numerics were not compared: " + str((check or {}).get("absent", "no comparison"))
    near = NEAR_8BIT if "adamw_8bit" in case.lower() else NEAR
    if not check["mean"] <= near:
        return f"its results are off by {check['mean']:.2g} on average"
    return told["median_ms"]


def rates(told):
    tflops, bandwidth = told.get("tflops", 0), told.get("gigabytes_per_second", 0)
    return f"ours {told['median_ms']:.3g} ms, " + (f"{tflops:.0f} TFLOP/s" if tflops else f"{bandwidth / 1e3:.2f} TB/s")


def speedup(line, names):
    """How many times faster ours is than the best of the named peers; a reason where that is not known."""
    own = counts(line["ours"], line["case"])
    if isinstance(own, str):
        return "ours: " + own, ""
    found, absent = {}, []
    for name in names:
        median = counts(line["peers"].get(name), line["case"])
        if isinstance(median, str):
            absent.append(f"{name}: {median}")
        else:
            found[name] = median
    if not found:
        return "; ".join(absent), ""
    best = min(found, key=found.get)
    note = f"{rates(line['ours'])}; {best} {found[best]:.3g} ms"
    return found[best] / own, note + ("; absent: " + "; ".join(absent) if absent else "")


def shape_of(line):
    return line["case"].split(" ", 1)[1]


def tokens_of(line):
    found = re.search(r" T(\d+)", line["case"])
    return int(found.group(1)) if found else None


# ---- kernels ---------------------------------------------------------------------------------------------------------

def against_peers(results, goal, op, names, bounds):
    """A row for each shape; bounds are (pass, moonshot), or those by tokens."""
    rows = []
    for line in results.of(goal, op):
        least, best = bounds.get(tokens_of(line), (None, None)) if isinstance(bounds, dict) else bounds
        value, note = speedup(line, names)
        rows.append(Row(goal, f"{shape_of(line)}: times faster than {' or '.join(names)}", value, least, best, note=note))
    return rows or [Row(goal, f"{op}: times faster than {' or '.join(names)}", results.why_not(goal), None, None)]


def against_copy(results, goal, op, bounds):
    rows = []
    for line in results.of(goal, op):
        own, beside = counts(line["ours"], line["case"]), line.get("beside") or {}
        value = own if isinstance(own, str) else beside.get("absent", "no copy was measured")
        if not isinstance(own, str) and "gigabytes_per_second" in beside:
            value = line["ours"]["gigabytes_per_second"] / beside["gigabytes_per_second"]
        rows.append(Row(goal, f"{shape_of(line)}: share of a copy's bandwidth", value, *bounds, note="" if isinstance(own, str) else rates(line["ours"])))
    return rows or [Row(goal, f"{op}: share of a copy's bandwidth", results.why_not(goal), *bounds)]


def k1(results):
    peers = ["bitsandbytes dequantize_4bit"]
    return against_copy(results, "K1", "dequantize", (0.8, 0.9)) + against_peers(results, "K1", "dequantize", peers, (1.1, 1.3))


def k2(results):
    peers = ["bitsandbytes quantize_4bit", "torch FP8 to bf16 + bitsandbytes quantize_4bit"]
    rows = against_copy(results, "K2", "quantize", (0.7, 0.9)) + against_peers(results, "K2", "quantize", peers, (None, 2))
    return rows + [equal_codes(results, "K2")]


def k3(results):
    return against_peers(results, "K3", "linear", ["bitsandbytes matmul_4bit", "bitsandbytes dequantize + cuBLAS"], (1.1, 1.5))


def k4(results):
    resident = ["cuBLAS, bf16 resident"]
    return against_peers(results, "K4", "linear", resident, (0.85, 0.95)) + against_peers(results, "K4", "linear_dx", resident, (0.85, 0.95))


DEQUANTISED = ["bitsandbytes dequantize + torch grouped_mm"]


def k5(results):
    return against_peers(results, "K5", "grouped", DEQUANTISED, {1024: (2, 4), 4096: (1.3, 2), 16384: (1.0, 1.15)})


def k6(results):
    eager, grouped = "transformers Qwen3NextExperts, eager (its default)", "transformers Qwen3NextExperts, grouped_mm"
    return against_peers(results, "K6", "experts", [eager], (5, 20)) + against_peers(results, "K6", "experts", [grouped], (0.8, 1.0))


def k7(results):
    return against_peers(results, "K7", "grouped_dx", DEQUANTISED, {1024: (1.5, 3.5), 4096: (1.1, 1.8), 16384: (0.9, 1.1)})


def k8(results):
    rows = []
    for goal, op in (("K5", "grouped"), ("K7", "grouped_dx")):
        for row in against_peers(results, goal, op, [GROUPED_NF4], (1.3, 3)):
            row.goal = "K8"
            rows.append(row)
    return rows


def k9(results):
    lines, name = results.of("K9", "delta") + results.of("K9", "delta_backward"), "flash-linear-attention"
    what, bounds = f"forward and backward: times faster than {name}", (0.8, 1.8)
    sides = [(counts(line["ours"], line["case"]), counts(line["peers"].get(name), line["case"])) for line in lines]
    reasons = [side for pair in sides for side in pair if isinstance(side, str)]
    if len(lines) < 2 or reasons:
        return [Row("K9", what, "; ".join(reasons) or results.why_not("K9"), *bounds)]
    ours, theirs = (sum(pair[place] for pair in sides) for place in (0, 1))
    return [Row("K9", what, theirs / ours, *bounds, note=f"ours {ours:.3g} ms, theirs {theirs:.3g} ms")]


def k10(results):
    return against_peers(results, "K10", "delta_inputs", ["flash-linear-attention convolution and l2norm + torch"], (2, 4))


def k11(results):
    rows = []
    for line in results.of("K11", "loss"):
        own, working = counts(line["ours"], line["case"]), line["ours"].get("working_bytes")
        vocabulary = int(re.search(r" V(\d+)", line["case"]).group(1))
        logits = 2 * tokens_of(line) * vocabulary
        memory = own if isinstance(own, str) else (working if working is not None else "not told")
        share = memory / logits if not isinstance(memory, str) else memory
        rows.append(Row("K11", f"{shape_of(line)}: working memory over logits in bf16", share, 0.1, None, True))
        value, note = speedup(line, [FLOOR])
        rows.append(Row("K11", f"{shape_of(line)}: time over two cuBLAS products", value if isinstance(value, str) else 1 / value, 1.2, 1.05, True, note))
        for name in ("torch logits + cross_entropy", "Liger fused linear cross-entropy", "cut-cross-entropy"):
            value, note = speedup(line, [name])
            rows.append(Row("K11", f"{shape_of(line)}: times faster than {name}", value, None, None, note=note))
    return rows or [Row("K11", "head and loss", results.why_not("K11"), None, None)]


def k12(results):
    names = ["torch SDPA, flash", "torch SDPA, cuDNN"]
    return against_peers(results, "K12", "attention", names, (0.5, 1.0)) + against_peers(results, "K12", "attention_backward", names, (0.4, 0.9))


def k13(results):
    rows = []
    for op in ("linear", "linear_dx"):
        for line in results.of("K13", op):
            own, plain = counts(line["ours"], line["case"]), (line.get("beside") or {}).get("median_ms", "not measured without")
            value = next((side for side in (own, plain) if isinstance(side, str)), None)
            value = own / plain - 1 if value is None else value
            rows.append(Row("K13", f"{shape_of(line)}: what the adapter adds", value, 0.15, 0.05, True, "; ".join(peft_costs(line))))
    return rows or [Row("K13", "what an adapter adds", results.why_not("K13"), 0.15, 0.05, True)]


def peft_costs(line):
    for name in line["peers"]:
        sides = [counts(line["peers"].get(other), line["case"]) for other in (name, name + WITHOUT)]
        if not name.endswith(WITHOUT):
            reason = next((side for side in sides if isinstance(side, str)), None)
            yield f"{name}: {reason}" if reason else f"{name} adds {sides[0] / sides[1] - 1:.0%}"


def k14(results):
    rows = against_peers(results, "K14", "grouped_lora", ["loop over experts"], (10, None))
    return rows + against_peers(results, "K14", "grouped_lora", ["torch grouped_mm"], (None, 2))


def k15(results):
    peers = against_peers(results, "K15", "adamw_8bit", ["bitsandbytes AdamW8bit"], (1.0, 1.3))
    return peers + against_copy(results, "K15", "adamw_8bit", (0.7, 0.85))



# ---- whole steps -----------------------------------------------------------------------------------------------------

def against_layers(results, goal, names, bounds):
    what = f"step: times faster than {' or '.join(names)}"
    lines = [line for line in results.having("layers") if line.get("goal") == goal]
    if not lines:
        return [Row(goal, what, results.why_not(goal), *bounds)]
    line = lines[-1]
    if "absent" in line.get("ours", {}):
        return [Row(goal, what, "ours: " + line["ours"]["absent"], *bounds)]
    found, absent = {}, []
    for name, told in line["peers"].items():
        if any(word in name for word in names):
            if "median_ms" in told and told.get("is_sane"):
                found[name] = told
            else:
                absent.append(f"{name}: {told.get('absent', 'its loss is no number')}")
    if not found or not line["ours"]["is_sane"]:
        return [Row(goal, what, "; ".join(absent) or "no such peer ran", *bounds)]
    best = min(found, key=lambda name: found[name]["median_ms"])
    paths = ", ".join(path for path, ran in found[best].get("fast_paths", {}).items() if ran) or "no fast path"
    note = f"ours {line['ours']['median_ms']:.1f} ms; {best} {found[best]['median_ms']:.1f} ms with {paths}"
    return [Row(goal, what, found[best]["median_ms"] / line["ours"]["median_ms"], *bounds, note="; ".join([note, *absent]))]


def e1(results):
    return against_layers(results, "E1", ["transformers + PEFT, grouped_mm experts, bf16"], (1.0, 2))


def e2(results):
    return against_layers(results, "E2", ["transformers + PEFT, NF4 experts decoded for each pass"], (2, 5))


def e3(results):
    return against_layers(results, "E3", ["(E3)"], (1.1, 2))


def steps(results, name):
    return [line for line in results.having("model") if line.get("measurement") == name]


def by_length(results, goal, what, bounds, value_of, smaller=False):
    rows = []
    # Of several runs of one length the last counts.
    for line in {line["tokens"]: line for line in steps(results, "speed")}.values():
        if line["tokens"] in bounds:
            value, note = value_of(line)
            rows.append(Row(goal, f"{line['tokens']} tokens: {what}", value, *bounds[line["tokens"]], smaller, note))
    return rows or [Row(goal, what, results.why_not(goal), None, None, smaller)]


def e4(results):
    return by_length(results, "E4", "tokens/s, 48 layers", {4096: (4000, 11000), 16384: (6000, 15000)},
                     lambda line: (line["tokens_per_second"], f"{line['seconds'][0]:.3f} s a step"))


def e5(results):
    def mfu(line):
        return line["flops"] / line["seconds"][0] / PEAK_TFLOPS / 1e12, f"{line['flops'] / line['tokens'] / 1e9:.1f} GFLOP a token, counted"
    return by_length(results, "E5", f"share of {PEAK_TFLOPS} TFLOP/s", {4096: (0.15, 0.45), 16384: (0.15, 0.45)}, mfu)


def memory_of(results, goal, name, bounds):
    lines = steps(results, name)
    what = f"{name}: GiB of the device in use, by all"
    if not lines:
        return [Row(goal, what, results.why_not(goal), *bounds, True)]
    used = lines[-1].get("device_bytes")
    value = used / GIB if used else "the device does not tell"
    note = f"{(lines[-1].get('device_bytes_before') or 0) / GIB:.2f} GiB of it before the model"
    return [Row(goal, what, value, *bounds, True, note)]


def e6(results):
    return memory_of(results, "E6", "memory", (46, 42))


def e7(results):
    return memory_of(results, "E7", "memory with routed experts' adapters of rank 16", (66, 56)) + \
        memory_of(results, "E7", "memory with routed experts' adapters of rank 4", (50, 46))


def e8(results):
    def idle(line):
        shares = {"marks": line.get("idle_share"), "nvidia-smi": line.get("smi_idle_share")}
        known = {name: share for name, share in shares.items() if share is not None}
        if not known:
            return "the device does not tell", ""
        return max(known.values()), ", ".join(f"{name} {share:.1%}" for name, share in known.items())
    bounds = {tokens: (0.1, 0.02) for tokens in (1024, 4096, 16384)}
    return by_length(results, "E8", "share of a step in which the GPU idles", bounds, idle, True)


def e9(results):
    rows = []
    lines = results.having("loading")
    for what, key, read in (("FP8 checkpoint", "load_and_write_snapshot", "plain_read_of_checkpoint"),
                            ("snapshot", "load_from_snapshot", "plain_read_of_snapshot")):
        value, note, bounds = results.why_not("E9"), "", (None, None)
        if lines:
            own, plain = lines[-1]["loading"][key]["process_seconds"], lines[-1]["loading"][read]["seconds"]
            first = max((line.get("first_step_seconds", 0) for line in steps(results, "speed")), default=0)
            value, bounds = own + first, (1.5 * plain + 30, 1.1 * plain + 5)
            note = f"{own:.1f} s to load, {plain:.1f} s to read, {first:.1f} s the first step"
        rows.append(Row("E9", f"{what}: seconds to the first step", value, *bounds, True, note))
    return rows


def e10(results):
    rows = []
    for card, limit, bounds in (("80 GB", 80e9, (32768, 98304)), ("141 GB", 141e9, (131072, 262144))):
        fitting = [line["tokens"] for line in steps(results, "longest") if (line.get("device_bytes") or limit + 1) <= limit]
        value = max(fitting) if fitting else results.why_not("E10")
        rows.append(Row("E10", f"longest document measured within {card}, tokens", value, *bounds))
    return rows


# ---- numbers ---------------------------------------------------------------------------------------------------------

def q1(results):
    found = [float(error) for line in results.having("golden") for case in line["golden"] for error in re.findall(r"packed ([\d.e+-]+)/", case)]
    value = max(found) if found else results.why_not("Q1")
    return [Row("Q1", "packed against separate documents, largest relative difference of logits", value, 1e-3, 0.0, True)]


def q2(results):
    lines = [line for line in results.having("training") if "mean_relative_loss_difference" in line]
    value = max((line["mean_relative_loss_difference"] for line in lines), default=results.why_not("Q2"))
    note = "; ".join(f"{line['training']}: {line['steps']} steps" for line in lines)
    return [Row("Q2", "losses against float32 on the CPU, mean relative difference", value, 1e-2, 1e-3, True, note)]


def q3(results):
    lines = results.having("determinism")
    value = (1.0 if isinstance(lines[-1]["determinism"], str) else 0.0) if lines else results.why_not("Q3")
    return [Row("Q3", "losses and adapter of two runs are equal byte for byte (1 is yes)", value, 1, 1)]


def equal_codes(results, goal):
    lines = results.having("codes")
    value = results.why_not(goal)
    if lines:
        theirs = lines[-1]["bitsandbytes"]
        value = float(lines[-1]["equal"]) if "equal" in lines[-1] else "bitsandbytes: " + str(theirs.get("absent"))
    return Row(goal, "codes and scales are bitsandbytes' own, bit by bit (1 is yes)", value, 1, 1)


def q4(results):
    return [equal_codes(results, "Q4")]


# By goal: what it is, the part of gpu-check, the cases of the part, and its rows.
GOALS = {
    "K1": ("NF4 decoding, nested scale in one launch", "bench", "K1", k1),
    "K2": ("NF4 quantising, of bf16 and FP8", "bench", "K2", k2),
    "K3": ("NF4 linear layer, 64 to 512 tokens", "bench", "K3", k3),
    "K4": ("the same, 4k and 16k tokens", "bench", "K4", k4),
    "K5": ("routed experts, forward", "bench", "K5", k5),
    "K6": ("a whole block of experts beside transformers' own", "bench", "K6", k6),
    "K7": ("routed experts, gradient of the input", "bench", "K7", k7),
    "K8": ("beside the public fused NF4 kernel", "bench", "K5,K7", k8),
    "K9": ("gated delta rule, 8k tokens in 8 documents", "bench", "K9", k9),
    "K10": ("what comes before the delta rule, in one", "bench", "K10", k10),
    "K11": ("frozen head and loss", "bench", "K11", k11),
    "K12": ("attention, heads of 256", "bench", "K12", k12),
    "K13": ("what an adapter adds to its layer", "bench", "K13", k13),
    "K14": ("gradients of routed adapters", "bench", "K14", k14),
    "K15": ("AdamW with moments in 8 bits", "bench", "K15", k15),
    "E1": ("one layer, a step of 4k tokens", "layers", None, e1),
    "E2": ("four layers, a step of 4k tokens", "layers", None, e2),
    "E3": ("four layers with adapters of the experts, beside Unsloth and experts4bit", "layers", None, e3),
    "E4": ("the whole 80B model, tokens/s", "model", None, e4),
    "E5": ("true share of the peak", "model", None, e5),
    "E6": ("memory, 2 documents of 2048", "memory", None, e6),
    "E7": ("memory with adapters of the routed experts", "memory", None, e7),
    "E8": ("share of a step in which the GPU idles", "model", None, e8),
    "E9": ("time to the first step", "loading,model", None, e9),
    "E10": ("the longest document", "longest", None, e10),
    "Q1": ("packed and separate documents agree", "golden", None, q1),
    "Q2": ("200 steps beside float32", "training", None, q2),
    "Q3": ("the same bits twice", "determinism", None, q3),
    "Q4": ("NF4 is bitsandbytes' own", "bench", "K2", q4),
}


def rows_of(lines):
    """Every row of every goal."""
    results = Results(lines)
    return [row for *_, rows in GOALS.values() for row in rows(results)]


def number(value):
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(rows):
    """The rows as a page."""
    lines = ["| goal | figure | measured | pass | moonshot | verdict | note |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        sign = "≤ " if row.smaller_is_better else "≥ "
        bounds = [sign + number(bound) if bound is not None else "–" for bound in (row.least, row.best)]
        measured = "–" if row.reason else number(row.value)
        note = (row.reason or row.note).replace("|", "/")
        lines.append(f"| {row.goal} | {row.what} | {measured} | {bounds[0]} | {bounds[1]} | {row.verdict} | {note} |")
    verdicts = [row.verdict for row in rows]
    told = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in (MOONSHOT, PASS, MISSED, BELOW, TOLD, UNKNOWN))
    return "\n".join([*lines, "", told, ""])


def page():
    """Which command measures which goal."""
    lines = ["| goal | what | measured by |", "|---|---|---|"]
    for goal, (what, parts, cases, _) in GOALS.items():
        lines.append(f"| {goal} | {what} | `{COMMAND}{parts}{' --cases ' + cases if cases else ''}` |")
    return "\n".join(lines) + "\n"


def main():
    if sys.argv[1:] == ["--page"]:
        print(page(), end="")
        return
    with open(sys.argv[1], encoding="utf-8") as file:
        print(table(rows_of([json.loads(line) for line in file if line.strip()])))


if __name__ == "__main__":
    main()
