"""Small models of many architectures, made from configurations. Not a test; `test_packs.py` and `test_probe.py` use it."""

from __future__ import annotations

import torch

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=97,
    intermediate_size=96,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.15,  # far from uniform, so that a wrong mask or position shows
)
GROUPED = dict(num_key_value_heads=2)
WINDOW = dict(sliding_window=6)
ALTERNATING = dict(layer_types=["sliding_attention", "full_attention"], head_dim=16, query_pre_attn_scalar=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)

# what the design promises; the window is shorter than a row
SHARED = {
    "GPTNeoX": dict(),
    "Llama": GROUPED,
    "Mistral": GROUPED | WINDOW,
    "Qwen2": GROUPED,
    "Qwen2-window": GROUPED | WINDOW | dict(use_sliding_window=True, layer_types=["sliding_attention"] * 2),
    "Qwen3": GROUPED | dict(head_dim=16),
    "Gemma": GROUPED | dict(head_dim=16),
    "Gemma2": GROUPED | WINDOW | ALTERNATING | dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "Gemma3Text": GROUPED | WINDOW | ALTERNATING,
    "Phi3": GROUPED,
    "Phi3-window": GROUPED | WINDOW,
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Olmo3": GROUPED | WINDOW | dict(layer_types=["sliding_attention", "full_attention"]),
    "SmolLM3": GROUPED,
    "Granite": GROUPED | dict(attention_multiplier=0.25, logits_scaling=2.0, residual_multiplier=0.5),
    "GraniteMoe": GROUPED | dict(num_local_experts=4, num_experts_per_tok=2),
    "Mixtral": GROUPED | WINDOW | dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen2Moe": GROUPED | EXPERTS | dict(shared_expert_intermediate_size=32),
    "Qwen3Moe": GROUPED | EXPERTS | dict(head_dim=16),
    "GPT2": dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "OPT": dict(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0),
    "Cohere": GROUPED | dict(logit_scale=0.5),
    "Glm4": GROUPED | dict(head_dim=16),
    "Starcoder2": GROUPED | WINDOW,
    "DeepseekV3": dict(
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
}
# what packs cannot express, and a word of the reason that the probe gives
SEPARATE = {
    "Bloom": (dict(n_layer=2, n_head=4), "AttentionInterface"),
    "Mpt": (dict(d_model=64, n_heads=4, n_layers=2), "AttentionInterface"),
    "GPTJ": (dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8), "AttentionInterface"),
    "Falcon": (dict(alibi=True, new_decoder_architecture=False), "AttentionInterface"),
    "StableLm": (GROUPED, "0 of its 2 layers"),
    "Nemotron": (GROUPED, "0 of its 2 layers"),
    "GptOss": (GROUPED | WINDOW | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2), "s_aux"),
    "Lfm2": (GROUPED | dict(layer_types=["conv", "full_attention"]), "conv"),
    "Jamba": (
        GROUPED | dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
        "linear",
    ),
    "FalconH1": (GROUPED | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8), "hybrid"),
    "Qwen3Next": (GROUPED | EXPERTS | dict(head_dim=16, layer_types=["linear_attention", "full_attention"]), "linear"),
}


def make(name: str, settings: dict, **changes) -> torch.nn.Module:
    """A causal LM of class `{name}ForCausalLM`, random weights from seed 0, float32."""
    import transformers

    kind = name.partition("-")[0]
    values = COMMON | settings | changes
    classes = [getattr(transformers, f"{kind}{end}", None) for end in ("TextConfig", "Config")]
    config = next(c for c in classes if c)(**values)
    torch.manual_seed(0)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)  # sdpa would leave the cap out
    how = {"attn_implementation": "eager"} if capped else {}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
    return model.eval()


def adapted(model: torch.nn.Module):
    """`model` under both adapters, the policy moved so that its B is not zero."""
    from peft import LoraConfig

    from lorat.model.adapters import attach
    from lorat.reference import adapter_parameters

    model.requires_grad_(False)
    targets = ["q_proj", "v_proj"] if model.config.model_type in ("falcon_h1", "jamba", "lfm2") else "all-linear"
    policy = attach(model, LoraConfig(r=4, target_modules=targets))
    draw = torch.Generator().manual_seed(1)
    for name, p in adapter_parameters(policy, "default").items():
        if "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=draw))
    return policy.eval()
