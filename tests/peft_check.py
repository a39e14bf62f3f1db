#!/usr/bin/env python3
"""Loads an adapter with PEFT and compares its loss with brightrun's own. Run by hand; needs torch, transformers, peft.

    tests/peft_check.py MODEL_DIR ADAPTER_DIR DATASET.jsonl [--limit 3] [--brightrun target/release/brightrun]

Fails when the two losses differ by more than 1e-4 per token: both are float32 sums in another order over some hundred
tokens, so about 1e-6 is expected.
"""
import argparse, json, subprocess, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benches"))
from train_vs_transformers import examples

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("adapter")
parser.add_argument("dataset")
parser.add_argument("--limit", type=int, default=3)
parser.add_argument("--brightrun", default="target/release/brightrun")
arguments = parser.parse_args()

ours = json.loads(subprocess.run(
    [arguments.brightrun, "eval", "--model", arguments.model, "--adapter", arguments.adapter, "--dataset", arguments.dataset,
     "--limit", str(arguments.limit), "--json"], check=True, stdout=subprocess.PIPE).stdout)

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
model = PeftModel.from_pretrained(model, arguments.adapter).eval()
total, count = 0.0, 0
for messages in examples(arguments.dataset, arguments.limit):
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[start - 1:]
    total, count = total + losses.double().sum().item(), count + losses.numel()
peer = total / count
print(json.dumps({"peft": peer, "brightrun": ours["loss"], "difference": peer - ours["loss"], "tokens": count,
                  "brightrun_tokens": ours["supervised_tokens"]}))
sys.exit(abs(peer - ours["loss"]) > 1e-4 or count != ours["supervised_tokens"])
