"""The parts of `scripts/gpu-check`: what each runs, and what makes it pass."""
import hashlib
import json
import os
import shutil
import sys
import time

from running import Missing, Utilisation, as_json, last_lines, smi

# Multiply-adds of a case that the sanitizer, a hundred times slower, can afford.
SANITIZED_WORK = 300_000
# Steps of the short training, and of that whose losses are compared with float32.
STEPS, LONG_STEPS, TRIAL_STEPS = 12, 200, 2
# The model of the whole-model benchmark.
MODEL = "qwen3-next-80b-a3b"
LENGTHS = (1024, 4096, 16384)
MODEL_STEPS = 20
# Longest documents that are tried, in rising order: memory is a peak, so they share one process.
LONGEST = "32768,98304,131072,262144"
# By the name that `goals.py` looks for: what adapters and optimizer take memory.
MEMORY = {
    "memory": [],
    "memory with routed experts' adapters of rank 4": ["--targets", "default,experts", "--rank", "4"],
    "memory with routed experts' adapters of rank 16": ["--targets", "default,experts", "--rank", "16"],
}
ADAPTER_BYTES = str(64 << 30)
# Largest relative difference of a step's loss between bf16 on the device and on the CPU: bf16 keeps 8 bits, and the miniature model
# adds up some hundred roundings of the size 2^-9 with random signs.
LOSS_TOLERANCE = 0.02


def devices(run):
    if run.is_trial:
        run.say({"devices": {"devices": [run.device]}})
        return None
    status, text = run.command([run.program("brightrun"), "kernels", "devices", "--json"])
    found = as_json(text.strip().splitlines()[-1]) if status == 0 and text.strip() else None
    if found is None:
        run.no_device = "no device: " + last_lines(text)
    elif not found["devices"]:
        run.no_device = "no device: " + found["reason"]
    if run.no_device:
        raise Missing(run.no_device)
    found["smi"] = smi("name,driver_version,clocks.sm,clocks.mem,power.limit")
    with open(run.path("revision"), encoding="utf-8") as file:
        found["revision"] = file.read().strip()
    run.say({"devices": found})
    return None


def on_device(run):
    return {"BRIGHTRUN_BACKENDS": run.device, "BRIGHTRUN_REQUIRED_BACKENDS": run.device}


def conformance(run):
    words = [run.program("conformance"), "--nocapture"]
    status, text = run.command(words, on_device(run))
    compared = [line.split() for line in text.splitlines() if line.strip().startswith(run.device + " ")]
    run.say({"conformance": {"ops": len(compared), "tensors": sum(int(line[2]) for line in compared if line[2].isdigit())}})
    if status == 0:
        return None if compared else f"no op was compared; {last_lines(text)}"
    # Where one kernel breaks the context everything after it fails too: say which launch it was.
    run.command([*words, "--test-threads=1"], dict(on_device(run), BRIGHTRUN_CUDA_SYNCHRONOUS="1"))
    failed = [line.strip() for line in text.splitlines() if line.strip().endswith("FAILED")]
    return f"status {status}; {'; '.join(failed)[:400] or last_lines(text)}"


def sanitized(tool):
    def part(run):
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if run.is_trial or not os.path.exists(sanitizer):
            raise Missing("compute-sanitizer looks at devices only" if run.is_trial else "compute-sanitizer is not installed")
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", run.program("conformance"),
                 "--test-threads=1", "--nocapture"]
        status, text = run.command(words, dict(on_device(run), BRIGHTRUN_MOST_WORK=str(SANITIZED_WORK)))
        summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        run.say({tool: summary[-1:] or last_lines(text)})
        return None if status == 0 else f"status {status}; {(summary or [last_lines(text)])[-1]}"
    return part


def golden(run):
    # The same program has the cases of the other backends, of which one is the trial's.
    test = "golden_cases_agree_on_the_emulated_device" if run.is_trial else "golden_cases_agree_on_the_gpu"
    status, text = run.command([run.program("golden"), "--exact", test, "--nocapture"], on_device(run))
    cases = [line.strip() for line in text.splitlines() if line.startswith("golden ") and f" on {run.device}" in line]
    run.say({"golden": cases})
    if status != 0:
        return f"status {status}; {last_lines(text)}"
    return None if any("agrees" in line for line in cases) else f"no case ran; {last_lines(text)}"


# ---- training --------------------------------------------------------------------------------------------------------

def train(run, device, name, dtype, steps):
    adapter = os.path.join(run.scratch, "adapters", name)
    shutil.rmtree(adapter, ignore_errors=True)
    words = [run.program("brightrun"), "train", "--device", device, "--model", run.path("model"), "--dataset", run.path("sample.jsonl"),
             "--out", adapter, "--steps", str(steps), "--base-dtype", dtype, "--json"]
    if run.is_trial:
        words += ["--batch-size", "1"]
    status, text = run.command(words)
    if status != 0:
        raise RuntimeError(f"{name}: status {status}; {last_lines(text)}")
    lines = [line for line in map(as_json, text.splitlines()) if line and "loss" in line and "step" in line]
    with open(os.path.join(adapter, "adapter_model.safetensors"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    rates = sorted(line.get("tokens_per_second", 0.0) for line in lines[1:]) or [0.0]
    losses = [line["loss"] for line in lines]
    run.say({"training": name, "device": device, "base_dtype": dtype, "losses": losses, "tokens_per_second": rates[len(rates) // 2],
             "adapter_sha256": digest})
    return losses, digest


def training(run):
    """NF4 beside the CPU's, and bf16 beside float32 for long enough that differences would grow."""
    short, long = (TRIAL_STEPS, TRIAL_STEPS) if run.is_trial else (STEPS, LONG_STEPS)
    problems = []
    for dtype, reference, steps in (("nf4", "nf4", short), ("bf16", "f32", long)):
        expected, _ = train(run, "cpu", f"cpu-{reference}", reference, steps)
        losses, _ = train(run, run.device, f"{run.device}-{dtype}", dtype, steps)
        if len(losses) != steps or len(expected) != steps:
            problems.append(f"{dtype}: {len(losses)} steps, {len(expected)} on the CPU, of {steps}")
            continue
        off = [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, expected)]
        line = {"training": f"{dtype} against {reference} on the CPU", "worst_relative_loss_difference": max(off), "bound": LOSS_TOLERANCE}
        if reference == "f32":
            line.update(mean_relative_loss_difference=sum(off) / len(off), steps=steps)
        run.say(line)
        if not max(off) <= LOSS_TOLERANCE:
            problems.append(f"{dtype}: losses differ by {max(off):.3g}")
    return "; ".join(problems) or None


def determinism(run):
    problems = []
    steps = TRIAL_STEPS if run.is_trial else STEPS
    for dtype in ("bf16", "nf4"):
        losses, first = train(run, run.device, f"determinism-{dtype}-1", dtype, steps)
        again, second = train(run, run.device, f"determinism-{dtype}-2", dtype, steps)
        if losses != again:
            problems.append(f"{dtype}: the losses of two runs differ")
        if first != second:
            problems.append(f"{dtype}: the adapters of two runs differ")
    run.say({"determinism": problems or "losses and adapters of two runs are equal byte for byte"})
    return "; ".join(problems) or None


# ---- whole steps -----------------------------------------------------------------------------------------------------

def measured_steps(run, measurement, arguments):
    """Runs `brightrun bench` and tells each of its measurements; what went wrong, if anything did."""
    marks, told, before = {}, [], [None]

    def on_line(text):
        line = as_json(text)
        if line is None:
            return
        if "measuring" in line:
            marks[line["measuring"]] = time.monotonic()
        elif "model" in line:
            before[0] = line["model"].get("device_bytes_before")
        elif "tokens_per_second" in line:
            told.append((line, time.monotonic()))
    model = run.program("peers/trial.json") if run.is_trial else MODEL
    words = run.brightrun("bench", "--model", model, *arguments, "--json")
    with Utilisation() as used:
        status, text = run.command(words, on_line=on_line)
    for line, end in told:
        idle = used.idle_share(marks.get(line["tokens"], end), end)
        run.say({"model": MODEL, "measurement": measurement, **line, "device_bytes_before": before[0], "smi_most_mib": used.most_mib(),
                 "smi_idle_share": idle})
    if status != 0 or not told:
        return f"{measurement}, {' '.join(arguments)}: status {status}; {last_lines(text)}", told
    return None, told


def model(run):
    # One run for each length: running out of memory ends only its own.
    problems = []
    for tokens in (64,) if run.is_trial else LENGTHS:
        repetitions = 2 if run.is_trial else MODEL_STEPS
        problem, told = measured_steps(run, "speed", [
            "--tokens", str(tokens), "--documents", str(max(tokens // 4096, 1)), "--repetitions", str(repetitions), "--base-dtype",
            "nf4-experts"])
        problems += [problem] if problem else []
        if told and not told[-1][0]["is_recorded"]:
            problems.append(f"{tokens} tokens: the steps were queued op by op, not replayed")
    return "; ".join(problems) or None


def memory(run):
    tokens = "64" if run.is_trial else "4096"
    problems = []
    for name, adapters in MEMORY.items():
        problem, _ = measured_steps(run, name, [
            "--tokens", tokens, "--documents", "2", "--warm-up", "2", "--repetitions", "1", "--base-dtype", "nf4", "--optimizer",
            "adamw-8bit", "--adapter-budget-bytes", ADAPTER_BYTES, *adapters])
        problems += [problem] if problem else []
    return "; ".join(problems) or None


def longest(run):
    problem, told = measured_steps(run, "longest", [
        "--tokens", "64,128" if run.is_trial else LONGEST, "--documents", "1", "--warm-up", "0", "--repetitions", "1", "--base-dtype",
        "nf4-experts"])
    # The first that does not fit ends the run: what fitted is the figure.
    return None if told else problem


def loading(run):
    if run.is_trial:
        raise Missing("a checkpoint of the model's real width is nothing for a trial")
    out = os.path.join(run.scratch, "loading.json")
    words = [sys.executable, run.program("peers/loading.py"), "--brightrun", run.program("brightrun"), "--device", run.device,
             "--work", run.scratch, "--layers", "2", "--rounds", "1", "--base-dtype", "nf4-experts", "--out", out]
    status, text = run.command(words)
    if status != 0:
        return f"status {status}; {last_lines(text)}"
    with open(out, encoding="utf-8") as file:
        run.say({"loading": json.load(file)["rounds"][-1]})
    return None


# ---- beside peers ----------------------------------------------------------------------------------------------------

def passed_on(run, words):
    """Runs a program whose lines are results."""
    status, text = run.command(words)
    lines = [line for line in map(as_json, text.splitlines()) if line]
    for line in lines:
        run.say(line)
    return lines, None if status == 0 else f"status {status}; {last_lines(text)}"


def bench(run):
    words = [sys.executable, run.program("peers/peers.py"), "--bench", run.program("bench"), "--out", run.scratch, "--seconds",
             str(int(max(run.seconds_left() - 20, 10))), "--only", run.only_cases]
    if run.is_trial:
        words += ["--peer-device", "cpu", "--bench-argument=--device", "--bench-argument=" + run.device, "--bench-argument=--shrink",
                  "--bench-argument=4096"]
    lines, problem = passed_on(run, words)
    absent = [f"{line['case']}: {line['ours']['absent']}" for line in lines if "case" in line and "absent" in line["ours"]]
    return problem or ("ours did not run: " + "; ".join(absent) if absent else None)


def layers(run):
    if run.is_trial:
        raise Missing("layers of the model's real width are nothing for a trial")
    words = [sys.executable, run.program("peers/peers_model.py"), "--program", run.program("brightrun"), "--config",
             run.program(f"peers/{MODEL}.json"), "--out", run.scratch, "--seconds", str(int(max(run.seconds_left() - 60, 30)))]
    lines, problem = passed_on(run, words)
    broken = [line["ours"]["absent"] for line in lines if "absent" in line.get("ours", {})]
    return problem or (f"ours did not run: {broken[0]}" if broken else None)


# By name: what it does, and the minutes that it may take.
PARTS = {
    "devices": (devices, 1),
    "conformance": (conformance, 6),
    "golden": (golden, 3),
    "training": (training, 3),
    "determinism": (determinism, 3),
    "memcheck": (sanitized("memcheck"), 5),
    "racecheck": (sanitized("racecheck"), 5),
    "bench": (bench, 9),
    "model": (model, 6),
    "memory": (memory, 5),
    "longest": (longest, 6),
    "layers": (layers, 8),
    "loading": (loading, 5),
}
