#!/usr/bin/env python3
"""More golden cases, of other shapes than the recorded ones, made by transformers, PEFT and torch in float32 on a CPU.

    generate.py OUT            writes one folder a case
    BRIGHTRUN_GOLDEN_DIR=OUT cargo test --release -p brightrun-worker --test golden

Needs torch, transformers, peft, safetensors. Each case has a model with bfloat16 weights, an adapter whose B is not zero, logits,
token losses, the gradient of every LoRA tensor, and the losses, gradient norms and final adapter of six AdamW steps.
"""

import json
import math
import pathlib
import sys

import peft.utils.transformers_weight_conversion as conversion
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

# PEFT 0.21 moves the classical names of a mixture to its routed experts. Here a target means the module it names.
conversion._convert_peft_config_moe = lambda peft_config, model: None

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NEXT = [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"]
SHARED = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FULL, LINEAR = "full_attention", "linear_attention"
HYPER = {"learning_rate": 0.005, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 0.5, "steps": 6,
         "warmup_steps": 2, "schedule": "cosine to 0 over `steps`, as transformers.get_cosine_schedule_with_warmup"}


def rope(theta, partial=None):
    parameters = {"rope_type": "default", "rope_theta": theta}
    return parameters if partial is None else {**parameters, "partial_rotary_factor": partial}


def qwen2(**more):
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=211, max_position_embeddings=256, **more))


def qwen3(**more):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=233, max_position_embeddings=256, **more))


def moe(**more):
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(vocab_size=200, hidden_size=72, intermediate_size=90, max_position_embeddings=256, **more))


def qwen3_next(**more):
    return transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(vocab_size=200, hidden_size=72, intermediate_size=90, max_position_embeddings=256, **more))


OTHER_MOE = dict(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, head_dim=20, moe_intermediate_size=28,
                 num_experts=12, num_experts_per_tok=5, norm_topk_prob=False)
OTHER_NEXT = dict(num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=24, linear_conv_kernel_dim=3,
                  linear_key_head_dim=12, linear_value_head_dim=20, linear_num_key_heads=3, linear_num_value_heads=9,
                  moe_intermediate_size=28, shared_expert_intermediate_size=36, num_experts=12, num_experts_per_tok=5,
                  rope_parameters=rope(1e6, 0.5))

# name: model, targets, target parameters, rank, alpha, tokens of each of the two sequences
CASES = {
    "qwen2_odd": (lambda: qwen2(hidden_size=60, intermediate_size=84, num_hidden_layers=2, num_attention_heads=5,
                                num_key_value_heads=1, tie_word_embeddings=False, rope_parameters=rope(5e5)), DENSE, None, 3, 7, 53),
    "qwen3_wide_heads": (lambda: qwen3(hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=6,
                                       num_key_value_heads=3, head_dim=40, tie_word_embeddings=True, rope_parameters=rope(1e6)),
                         ["q_proj", "v_proj", "down_proj"], None, 5, 10, 71),
    "moe_12_top5": (lambda: moe(**OTHER_MOE), ATTENTION, None, 4, 8, 67),
    "moe_12_top5_experts": (lambda: moe(**OTHER_MOE), ATTENTION, EXPERTS, 3, 6, 67),
    "moe_sparse_step": (lambda: moe(**{**OTHER_MOE, "decoder_sparse_step": 2, "norm_topk_prob": True, "attention_bias": True,
                                       "tie_word_embeddings": True}), ATTENTION, EXPERTS, 2, 4, 40),
    "next_attention_first": (lambda: qwen3_next(**OTHER_NEXT, layer_types=[FULL, LINEAR, FULL, LINEAR], norm_topk_prob=False),
                             NEXT + SHARED, None, 4, 8, 90),
    "next_experts": (lambda: qwen3_next(**{**OTHER_NEXT, "linear_conv_kernel_dim": 5}, layer_types=[LINEAR, FULL, LINEAR, LINEAR],
                                        norm_topk_prob=True), NEXT + SHARED, EXPERTS, 3, 6, 130),
    "next_dense_layers": (lambda: qwen3_next(**OTHER_NEXT, layer_types=[LINEAR, LINEAR, FULL, LINEAR], mlp_only_layers=[0, 2]),
                          NEXT, None, 4, 4, 65),
}


def rounded(model, seed):
    """Weights of a usual scale, as a bfloat16 checkpoint has them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv1d" not in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "bias" in name and "dt_bias" not in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.to(torch.bfloat16)


def sequences(vocabulary, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (2, tokens), generator=generator)
    labels = ids.clone()
    labels[0, : tokens // 2] = -100
    labels[1, : tokens // 3] = -100
    return ids, labels


def token_losses(logits, labels):
    shifted = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), shifted.reshape(-1), ignore_index=-100, reduction="none")
    return losses.view(shifted.shape), (shifted != -100).sum()


def factor(step):
    if step < HYPER["warmup_steps"]:
        return step / HYPER["warmup_steps"]
    share = (step - HYPER["warmup_steps"]) / (HYPER["steps"] - HYPER["warmup_steps"])
    return 0.5 * (1 + math.cos(math.pi * share))


def state(model):
    return {key: value.detach().float().contiguous().clone() for key, value in get_peft_model_state_dict(model).items()}


def save_adapter(model, folder):
    folder.mkdir(parents=True)
    model.peft_config["default"].save_pretrained(folder)
    save_file(state(model), folder / "adapter_model.safetensors")


def make(folder, name, seed):
    build, targets, parameters, rank, alpha, tokens = CASES[name]
    rounded(build(), seed).save_pretrained(folder / "model")
    cls = type(build())
    base = cls.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager").eval()
    ids, labels = sequences(base.config.vocab_size, tokens, seed)
    tensors = {"input_ids": ids.int(), "labels": labels.int()}
    with torch.no_grad():
        tensors["base.logits"] = base(input_ids=ids).logits

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trained = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for key, value in trained:
            if "lora_B" in key:
                value.copy_(0.05 * torch.randn_like(value))
    save_adapter(model, folder / "adapter_init")

    optimizer = torch.optim.AdamW([value for _, value in trained], lr=HYPER["learning_rate"], betas=HYPER["betas"],
                                  eps=HYPER["eps"], weight_decay=HYPER["weight_decay"])
    losses, norms, rates = [], [], []
    for step in range(HYPER["steps"] + 1):
        logits = model(input_ids=ids).logits
        each, count = token_losses(logits, labels)
        loss = each.sum() / count
        losses.append(loss.item())
        if step == 0:
            tensors["lora.logits"], tensors["lora.token_loss"] = logits.detach(), each.detach()
        if step == HYPER["steps"]:
            break
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for key, value in trained:
                tensors["grad." + key.replace(".default", "")] = value.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_([value for _, value in trained], HYPER["max_grad_norm"]).item())
        rates.append(HYPER["learning_rate"] * factor(step))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        optimizer.step()
    save_adapter(model, folder / "adapter_final")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    expected = {
        "case": name, "model_type": base.config.model_type, "target_modules": targets, "target_parameters": parameters, "rank": rank,
        "alpha": alpha, "tokens": tokens, "hyper": HYPER, "losses": losses, "grad_norms": norms, "learning_rates": rates,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "expected.json").write_text(json.dumps(expected))


def main():
    out = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    for seed, name in enumerate(CASES):
        make(out / name, name, 100 + seed)
        print(name, flush=True)


if __name__ == "__main__":
    main()
