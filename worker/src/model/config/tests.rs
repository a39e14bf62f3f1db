#![allow(clippy::unwrap_used)]
use serde_json::{Value, json};

use super::*;

fn base() -> Value {
    json!({
        "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"
    })
}

fn parse_with(changes: Value) -> Result<ModelConfig> {
    let mut config = base();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::parse(&config.to_string())
}

#[test]
fn an_absent_head_dim_is_hidden_over_heads() {
    let mut config = base();
    config.as_object_mut().unwrap().remove("head_dim");
    assert_eq!(ModelConfig::parse(&config.to_string()).unwrap().head_dim, 16);
}

#[test]
fn theta_is_found_in_every_spelling() {
    let nested = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}});
    assert_eq!(parse_with(nested).unwrap().rope_theta, 5e5);
    let scaling = json!({"rope_scaling": {"type": "default"}});
    assert_eq!(parse_with(scaling).unwrap().rope_theta, 1e6);
}

#[test]
fn what_would_be_computed_differently_is_refused() {
    for (change, word) in [
        (json!({"model_type": "llama"}), "llama"),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "window",
        ),
        (
            json!({"use_sliding_window": true, "sliding_window": 128, "max_window_layers": 1}),
            "window",
        ),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "fp8"),
    ] {
        let failure = parse_with(change).unwrap_err();
        assert_eq!(failure.code, "MODEL_UNSUPPORTED");
        assert!(failure.message.contains(word), "{failure}");
    }
}

#[test]
fn a_window_that_no_layer_uses_is_accepted() {
    let unused = json!({"use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 0});
    assert!(parse_with(unused).is_ok());
}

#[test]
fn impossible_numbers_are_named() {
    for (change, word) in [
        (json!({"num_key_value_heads": 3}), "multiple"),
        (json!({"head_dim": 31}), "head_dim"),
        (json!({"vocab_size": 0}), "vocab_size"),
        (json!({"hidden_size": 1u64 << 40}), "hidden_size"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
    ] {
        let failure = parse_with(change).unwrap_err();
        assert_eq!(failure.code, "MODEL_CONFIG_INVALID");
        assert!(failure.message.contains(word), "{failure}");
    }
}

#[test]
fn biases_and_norms_follow_the_family() {
    let names = |config: ModelConfig| {
        config
            .tensors()
            .into_iter()
            .map(|tensor| tensor.name)
            .collect::<Vec<_>>()
    };
    let qwen2 = names(parse_with(json!({"model_type": "qwen2", "tie_word_embeddings": true})).unwrap());
    assert!(qwen2.contains(&"model.layers.1.self_attn.k_proj.bias".to_owned()));
    assert!(
        !qwen2
            .iter()
            .any(|name| name.contains("o_proj.bias") || name.contains("q_norm") || name == "lm_head.weight")
    );
    let qwen3 = names(parse_with(json!({})).unwrap());
    assert!(qwen3.contains(&"model.layers.0.self_attn.q_norm.weight".to_owned()));
    assert!(!qwen3.iter().any(|name| name.ends_with("bias")));
}

fn moe() -> Value {
    json!({
        "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "num_hidden_layers": 6
    })
}

fn next() -> Value {
    json!({
        "model_type": "qwen3_next", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "num_hidden_layers": 6, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4
    })
}

fn with(mut base: Value, changes: Value) -> Result<ModelConfig> {
    for (key, value) in changes.as_object().unwrap() {
        base[key] = value.clone();
    }
    parse_with(base)
}

#[test]
fn which_layers_have_experts_follows_both_settings() {
    let dense = |changes| with(moe(), changes).unwrap().moe.unwrap().dense_layers;
    assert_eq!(dense(json!({})), [0usize; 0]);
    assert_eq!(dense(json!({"mlp_only_layers": [4, 1]})), [1, 4]);
    // Every second layer, counted from one, and not layer 3 either.
    assert_eq!(
        dense(json!({"decoder_sparse_step": 2, "mlp_only_layers": [3]})),
        [0, 2, 3, 4]
    );
    let config = with(moe(), json!({"mlp_only_layers": [1]})).unwrap();
    assert!(config.routing(0).is_some() && config.routing(1).is_none());
    let names: Vec<String> = config.tensors().into_iter().map(|tensor| tensor.name).collect();
    assert!(names.contains(&"model.layers.0.mlp.experts.5.up_proj.weight".to_owned()));
    assert!(names.contains(&"model.layers.1.mlp.up_proj.weight".to_owned()));
}

#[test]
fn renormalisation_has_the_family_s_own_default() {
    assert!(!with(moe(), json!({})).unwrap().moe.unwrap().renormalise);
    assert!(with(next(), json!({})).unwrap().moe.unwrap().renormalise);
    assert!(
        with(moe(), json!({"norm_topk_prob": true}))
            .unwrap()
            .moe
            .unwrap()
            .renormalise
    );
}

#[test]
fn both_names_of_the_number_of_experts_are_read() {
    let renamed = with(moe(), json!({"num_experts": null, "num_local_experts": 12})).unwrap();
    assert_eq!(renamed.moe.unwrap().experts, 12);
}

#[test]
fn layer_types_come_from_the_list_or_from_the_interval() {
    let delta = |changes| with(next(), changes).unwrap().delta.unwrap().layers;
    assert_eq!(delta(json!({})), [0, 1, 2, 4, 5]);
    assert_eq!(delta(json!({"full_attention_interval": 2})), [0, 2, 4]);
    let (a, l) = ("full_attention", "linear_attention");
    assert_eq!(delta(json!({"layer_types": [a, l, l, a, a, l]})), [1, 2, 5]);
    let failure = with(next(), json!({"layer_types": [a, l]})).unwrap_err();
    assert!(failure.message.contains("2 entries"), "{failure}");
}

#[test]
fn the_rotated_share_is_found_in_every_spelling() {
    let rotary = |changes| with(next(), changes).unwrap().rotary;
    assert_eq!(rotary(json!({})), 8);
    assert_eq!(rotary(json!({"partial_rotary_factor": 0.5})), 16);
    let nested =
        json!({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.125, "rope_type": "default"}});
    assert_eq!(rotary(nested), 4);
}

#[test]
fn a_gated_query_projection_is_twice_as_wide_as_its_heads() {
    let config = with(next(), json!({})).unwrap();
    let shape = |name: &str| {
        let tensor = config.tensors().into_iter().find(|tensor| tensor.name == name);
        tensor.unwrap().shape
    };
    assert_eq!(shape("model.layers.3.self_attn.q_proj.weight"), [256, 64]);
    assert_eq!(shape("model.layers.3.self_attn.o_proj.weight"), [64, 128]);
    assert_eq!(shape("model.layers.0.linear_attn.conv1d.weight"), [128, 1, 4]);
}

#[test]
fn numbers_of_experts_and_heads_that_cannot_be_are_named() {
    for (base, change, word) in [
        (moe(), json!({"num_experts_per_tok": 7}), "num_experts_per_tok"),
        (moe(), json!({"mlp_only_layers": [6]}), "mlp_only_layers"),
        (moe(), json!({"decoder_sparse_step": 0}), "decoder_sparse_step"),
        (moe(), json!({"moe_intermediate_size": null}), "moe_intermediate_size"),
        (next(), json!({"linear_num_value_heads": 3}), "linear_num_value_heads"),
        (next(), json!({"partial_rotary_factor": 0.1}), "partial_rotary_factor"),
        (next(), json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor"),
    ] {
        let failure = with(base, change).unwrap_err();
        assert_eq!(failure.code, "MODEL_CONFIG_INVALID");
        assert!(failure.message.contains(word), "{failure}");
    }
}

#[test]
fn only_block_wise_fp8_is_read() {
    let blocks = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}});
    assert_eq!(parse_with(blocks).unwrap().fp8_block, Some([128, 64]));
    for settings in [
        json!({"quant_method": "gptq"}),
        json!({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}),
    ] {
        let failure = parse_with(json!({"quantization_config": settings})).unwrap_err();
        assert_eq!(failure.code, "MODEL_UNSUPPORTED");
    }
}
