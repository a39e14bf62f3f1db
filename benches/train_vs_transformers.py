#!/usr/bin/env python3
"""Training speed and memory of brightrun beside transformers + PEFT, same model, same data, same machine, one run.

    python -m venv .venv && .venv/bin/pip install torch transformers peft safetensors numpy
    .venv/bin/python benches/train_vs_transformers.py --model DIR --dataset FILE [--steps 6] [--rounds 2]

One example a step, rank 16 on the seven projections, AdamW, no activation checkpointing in the peer. Each side is a process of
its own; sides alternate (A B A B …). Speed counts every token of the examples trained on (prompt and answer), from the second
step on; memory is the peak resident set of the process. The best round of each side is reported, all rounds are kept.
Writes one JSON object to benches/results/train-vs-transformers-DATE.json and prints it.
"""
import argparse, datetime, json, os, platform, resource, subprocess, sys, time

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def examples(path, limit):
    """The trainable lines as chat messages; the history's repeated last user turn is dropped."""
    found = []
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        if "_meta" in row or not row.get("target_response"):
            continue
        history = row["conversation_history"]
        if history and history[-1]["role"] == "user" and history[-1]["content"] == row["current_user_input"]:
            history = history[:-1]
        messages = [{"role": "system", "content": row["system_prompt"].strip()}]
        messages += [{"role": turn["role"], "content": turn["content"]} for turn in history if turn["content"]]
        messages += [{"role": "user", "content": row["current_user_input"]},
                     {"role": "assistant", "content": row["target_response"]}]
        found.append(messages)
        if len(found) == limit:
            break
    return found


def peer(arguments):
    """Runs in a child process: trains with transformers + PEFT and prints one JSON line per step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.peer]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=SEVEN, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for step, messages in enumerate(examples(arguments.dataset, arguments.steps)):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        answer_end = len(tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        labels = [token if start <= index < answer_end else -100 for index, token in enumerate(ids)]
        began = time.perf_counter()
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(json.dumps({"step": step + 1, "loss": loss.item(), "gradient_norm": norm.item(), "tokens": len(ids),
                          "seconds": time.perf_counter() - began}), flush=True)


def measure(command):
    """Runs a command; returns its JSON lines and its peak resident bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output = process.stdout.read()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], usage.ru_maxrss * 1024


def speed(steps):
    """Tokens per second from the second step on."""
    later = [step for step in steps if "step" in step and step["step"] > 1]
    return sum(step["tokens"] for step in later) / sum(step["seconds"] for step in later)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--brightrun", default="target/release/brightrun")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(arguments)

    ours = lambda dtype: [arguments.brightrun, "train", "--model", arguments.model, "--dataset", arguments.dataset,
                          "--out", "/tmp/brightrun-bench-adapter", "--steps", str(arguments.steps), "--batch-size", "1",
                          "--rank", "16", "--alpha", "32", "--learning-rate", "1e-4", "--schedule", "constant", "--warmup-steps", "0",
                          "--order", "file", "--base-dtype", dtype, "--checkpoint-every", "0", "--json"]
    theirs = lambda dtype: [sys.executable, __file__, "--model", arguments.model, "--dataset", arguments.dataset,
                            "--steps", str(arguments.steps), "--threads", str(arguments.threads), "--peer", dtype]
    sides = {"brightrun bf16": ours("bf16"), "transformers+peft bfloat16": theirs("bfloat16"), "brightrun nf4": ours("nf4"),
             "transformers+peft float32": theirs("float32"), "brightrun f32": ours("f32")}
    rounds = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, command in sides.items():
            subprocess.run(["rm", "-rf", "/tmp/brightrun-bench-adapter", "/tmp/brightrun-bench-adapter.checkpoints"], check=True)
            steps, peak = measure(command)
            steps = [step for step in steps if "step" in step]
            rounds[name].append({"tokens_per_second": round(speed(steps), 1), "peak_resident_bytes": peak,
                                 "losses": [step["loss"] for step in steps], "tokens": [step["tokens"] for step in steps]})
            print(f"{name:28} {rounds[name][-1]['tokens_per_second']:8.1f} tokens/s {peak / 1e9:6.2f} GB", file=sys.stderr)
    best = {name: max(results, key=lambda result: result["tokens_per_second"]) for name, results in rounds.items()}
    base = best["transformers+peft bfloat16"]
    result = {
        "date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "ratio_of_bfloat16_speed": {name: round(side["tokens_per_second"] / base["tokens_per_second"], 3) for name, side in best.items()},
        "ratio_of_bfloat16_memory": {name: round(side["peak_resident_bytes"] / base["peak_resident_bytes"], 3) for name, side in best.items()},
        "rounds": rounds,
    }
    path = f"benches/results/train-vs-transformers-{result['date']}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
