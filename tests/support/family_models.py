"""Random tiny models of transformers, one or more to a family, every optional part switched on and away from zero."""

import torch

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 3.0, 7.0],
}
CASES = {
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("Llama", {"attention_bias": True}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 16,
            "sliding_window": None,
            "rope_parameters": YARN
            | {
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "llama_4_scaling_beta": 0.4,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "phi3-short": (
        "Phi3",
        {
            "original_max_position_embeddings": 200,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
        },
    ),
    "phi3-long": (
        "Phi3",
        {
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
        },
    ),
    "phi3-whole": (
        "Phi3",
        {
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.5]},
        },
    ),
    "glm": ("Glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("Glm4", {"head_dim": 16, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "glm4-moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "mistral-windows": ("Mistral", {"sliding_window": 16}),
    "ministral3-windows": (
        "Ministral3",
        {
            "head_dim": 16,
            "sliding_window": 13,
            "rope_parameters": YARN | {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 16},
        },
    ),
    "mixtral-windows": ("Mixtral", {"num_local_experts": 4, "sliding_window": 11}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3-windows": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-moe-windows": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "phi3-windows": (
        "Phi3",
        {
            "sliding_window": 15,
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "swiglu_limit": 0.8,
            "swiglu_alpha": 1.3,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 30000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "olmo3": (
        "Olmo3",
        {
            "num_hidden_layers": 5,
            "attention_bias": True,
            "sliding_window": 12,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
    ),
}
"""Name -> (transformers' prefix of ForCausalLM, settings beside SIZES). Windows are shorter than any context here."""


def save_model(folder, case, **changes):
    """The model of a case, with changes of its settings, saved in `folder`, in float32."""
    import transformers

    family, settings = CASES[case]
    torch.manual_seed(sum(case.encode()))
    kind = getattr(transformers, f"{family}ForCausalLM")
    # Eager: attention that knows sinks and takes any mask, experts that take float64.
    config = kind.config_class(**{**SIZES, **settings, **changes}, experts_implementation="eager")
    model = kind._from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.uniform_(weight, -0.5, 0.5)
        elif name.endswith("sinks"):
            torch.nn.init.uniform_(weight, 0.5, 2.5)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(bias, -0.3, 0.3)
    model.save_pretrained(folder)
    return model


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 131, (count,), generator=generator).tolist()


def greedy(model, prompt, count):
    """(tokens, logits [count, vocab]) that transformers' model gives, the whole sequence anew for each."""
    ids, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], torch.stack(rows)
