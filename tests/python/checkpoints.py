"""Small random DeepSeek checkpoints, and transformers' own models of them as the oracle."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

COMMON = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    max_position_embeddings=512,
    attn_implementation="eager",
)

# name: (model class, config class, settings)
V2 = (DeepseekV2ForCausalLM, DeepseekV2Config)
V3 = (DeepseekV3ForCausalLM, DeepseekV3Config)
V32 = (DeepseekV32ForCausalLM, DeepseekV32Config)
GLM = (GlmMoeDsaForCausalLM, GlmMoeDsaConfig)
CONFIGS = {
    # V2-Lite: no query compression, softmax, greedy
    "v2-lite": (*V2, dict(num_attention_heads=4, q_lora_rank=None, topk_method="greedy", rope_parameters=PLAIN)),
    "v2-lite-yarn": (
        *V2,
        dict(
            num_attention_heads=16,
            q_lora_rank=None,
            topk_method="greedy",
            rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
    ),
    # V2: the best groups, scaled weights
    "v2": (
        *V2,
        dict(
            num_attention_heads=8,
            q_lora_rank=40,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=4.0,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        ),
    ),
    "v2-one-head": (
        *V2,
        dict(
            num_attention_heads=1,
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=2,
            topk_group=1,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=PLAIN,
        ),
    ),
    # V3: sigmoid, corrected by a bias, groups by their two best
    "v3": (
        *V3,
        dict(
            num_attention_heads=8,
            q_lora_rank=40,
            n_group=2,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
    ),
    "v3-unnormalised": (
        *V3,
        dict(
            num_attention_heads=2,
            q_lora_rank=None,
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=1.3,
            attention_bias=True,
            rope_interleave=False,
            rope_parameters=PLAIN,
        ),
    ),
    # DeepSeek's own widths of a head and of the cache
    "v3-full-heads": (
        *V3,
        dict(
            num_attention_heads=4,
            q_lora_rank=48,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            num_hidden_layers=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
    ),
    # Sparse attention: few tokens are chosen, so that most of a test's contexts are longer. Many index heads: with
    # few, tokens that no head scores above zero are ties, which the oracle breaks as it likes.
    "v32": (
        *V32,
        dict(
            num_attention_heads=8,
            q_lora_rank=40,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
            index_topk=48,
            index_n_heads=16,
            index_head_dim=32,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
    ),
    "v32-full-heads": (
        *V32,
        dict(
            num_attention_heads=4,
            q_lora_rank=48,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            num_hidden_layers=2,
            n_group=1,
            topk_group=1,
            index_topk=100,
            index_n_heads=16,
            index_head_dim=128,
            rope_parameters=PLAIN,
        ),
    ),
    # Nothing is longer than what is chosen: dense attention.
    "v32-all": (
        *V32,
        dict(
            num_attention_heads=4,
            q_lora_rank=32,
            n_group=1,
            topk_group=1,
            index_topk=512,
            index_n_heads=4,
            index_head_dim=16,
            rope_parameters=PLAIN,
        ),
    ),
    # Layers that take what the one before them chose, the last among them.
    "glm": (
        *GLM,
        dict(
            num_attention_heads=4,
            q_lora_rank=40,
            qk_nope_head_dim=24,
            v_head_dim=32,
            num_hidden_layers=4,
            n_group=1,
            topk_group=1,
            index_topk=32,
            index_n_heads=16,
            index_head_dim=32,
            indexer_types=["full", "shared", "full", "shared"],
            rms_norm_eps=1e-5,
            rope_parameters=PLAIN,
        ),
    ),
}


def write_checkpoint(name, directory, seed=0):
    """Saves a random model to ``directory`` and returns it, in float32."""
    model_class, config_class, settings = CONFIGS[name]
    torch.manual_seed(seed)
    heads = settings["num_attention_heads"]
    model = model_class(config_class(**{**COMMON, **settings}, num_key_value_heads=heads)).float().eval()
    with torch.no_grad():
        # The default weights leave every layer near zero; these make each matter.
        for key, tensor in model.state_dict().items():
            if "norm" in key:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif "bias" in key:
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif "embed_tokens" in key:
                tensor.copy_((0.5 if model.config.tie_word_embeddings else 1.0) * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) / tensor.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return model


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_weights(directory, change):
    """``change(tensors)`` on the checkpoint's tensors by name."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def expected_logits(model, tokens):
    """(len(tokens), vocab_size) float32."""
    return model(torch.tensor([tokens])).logits[0].float().numpy()


@torch.no_grad()
def expected_greedy(model, tokens, count):
    out = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(tokens) :].tolist()


def random_tokens(count, seed=0, vocab_size=COMMON["vocab_size"]):
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
