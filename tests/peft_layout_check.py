#!/usr/bin/env python3
"""Loads an exported adapter with PEFT as anyone would, and compares the logits with those recorded in a golden case. Run by hand;
needs torch, transformers 5, peft 0.19 or later.

    brightrun export --adapter CASE/adapter_init --model CASE/model --out /tmp/exported
    tests/peft_layout_check.py CASE /tmp/exported

Golden cases were recorded with PEFT's rewriting of target_modules on mixtures of experts switched off; here it is on, as it is by
default. Fails when logits differ by more than a hundredth of what the adapter changes: on one recorded case, with routed experts, the
peer is four thousandths away from its own record. Adapters loaded as PEFT rewrites them are ninety hundredths away.
"""
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

case, adapter = sys.argv[1:3]
expected = load_file(f"{case}/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(f"{case}/model", dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    logits = model(input_ids=expected["input_ids"]).logits
difference = (logits - expected["lora.logits"]).abs().max().item()
changed = (expected["base.logits"] - expected["lora.logits"]).abs().max().item()
print(json.dumps({"case": case, "largest_difference": difference, "adapter_changes": changed}))
sys.exit(difference > 1e-2 * changed)
