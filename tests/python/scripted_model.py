"""A checkpoint that writes given texts, for tests of what a server makes of an answer: a real model that the engine runs,
with weights that leave it no choice.

Every script is cut into tokens that occur once in all scripts, so that each token says which comes next. Which script
an answer begins with is said by a letter in the prompt, one of ``letter(0)``, ``letter(1)``, ...: attention takes the
mean over the prompt, in which the letter of the latest script outweighs the others.
"""

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizer_files import BOS, EOS, byte_level, v3_splits
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MAX_SCRIPTS = 16
RANK = 64  # of the latent: a direction for each script
HEADS, V_DIM = 2, 32


def letter(script):
    """A control character, which nobody writes by accident."""
    return chr(1 + script) if script < 8 else chr(14 + script - 8)


def cut(text, taken, tokens):
    """`text` in pieces of two characters or more that are not in `taken`; `tokens` are pieces of their own the first time."""
    pieces = []
    while text:
        new = [t for t in tokens if t not in taken]
        size = next((len(t) for t in new if text.startswith(t)), 0)
        if not size:
            size = min([i for t in new if (i := text.find(t)) > 1] + [2])
            while size < len(text) and (text[:size] in taken or text[:size] in tokens):
                size += 1
        piece, text = text[:size], text[size:]
        if pieces and (piece in taken or len(piece) < 2):  # the end, too short to be new
            piece = pieces.pop() + piece
        assert piece not in taken and len(piece) > 1, piece
        taken.add(piece)
        pieces.append(piece)
    return pieces


def alphabet_text(text):
    """A text in the letters of the byte-level alphabet."""
    return "".join(piece for piece, _ in byte_level().pre_tokenize_str(text))


def write_tokenizer(directory, pieces, markers):
    """Returns tokens by their text, those of the letters, and how many tokens there are."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [alphabet_text(piece) for piece in pieces if piece not in markers]
    vocab = {text: i for i, text in enumerate([*bytes_, *words])}
    assert len(vocab) == len(bytes_) + len(words)
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*v3_splits(), byte_level()])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (BOS, EOS)])
    tokenizer.add_tokens([AddedToken(m, normalized=False, special=False) for m in markers])
    tokenizer.save(str(directory / "tokenizer.json"))
    added = [*markers, BOS, EOS]
    ids = {p: tokenizer.token_to_id(p if p in added else alphabet_text(p)) for p in [*pieces, *added]}
    assert None not in ids.values()
    return ids, [vocab[alphabet_text(letter(i))] for i in range(MAX_SCRIPTS)], tokenizer.get_vocab_size()


def write_weights(directory, size, width, chains, starts, letters):
    """`chains`: pairs of tokens that follow each other; `starts`: pairs of a script and a token that it may begin with;
    `letters`: of each script."""
    embedding, head = np.zeros((size, width), np.float32), np.zeros((size, width), np.float32)
    own = width - MAX_SCRIPTS  # behind it a direction for each script
    for token in range(size):
        embedding[token, token % own] = 1
    for script, token in enumerate(letters):
        embedding[token] = 0
        embedding[token, own + script] = 1
    for token, following in chains:
        head[following, token] = 1e9
    for script, token in starts:
        head[token, own + script] = 1e3
    a = np.zeros((RANK + 64, width), np.float32)
    b = np.zeros((HEADS * (64 + V_DIM), RANK), np.float32)
    out = np.zeros((width, HEADS * V_DIM), np.float32)
    for script in range(MAX_SCRIPTS):
        a[script, own + script] = 1
        b[64 + script, script] = 2.0**script  # of the first head's values
        out[own + script, script] = 1
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": np.ones(width, np.float32),
    }
    layer = {
        "input_layernorm.weight": np.ones(width, np.float32),
        "post_attention_layernorm.weight": np.ones(width, np.float32),
        "mlp.gate_proj.weight": np.zeros((64, width), np.float32),
        "mlp.up_proj.weight": np.zeros((64, width), np.float32),
        "mlp.down_proj.weight": np.zeros((width, 64), np.float32),
        "self_attn.q_proj.weight": np.zeros((HEADS * 128, width), np.float32),  # every key counts the same
        "self_attn.kv_a_proj_with_mqa.weight": a,
        "self_attn.kv_a_layernorm.weight": np.ones(RANK, np.float32),
        "self_attn.kv_b_proj.weight": b,
        "self_attn.o_proj.weight": out,
    }
    tensors |= {f"model.layers.0.{name}": tensor for name, tensor in layer.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def config(size, width, ids):
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": width, "vocab_size": size,
        "num_hidden_layers": 1, "first_k_dense_replace": 1, "intermediate_size": 64, "moe_intermediate_size": 32,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": None, "kv_lora_rank": RANK,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": V_DIM, "attention_bias": False, "hidden_act": "silu",
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "torch_dtype": "float32",
    }  # fmt: skip


def write_model(directory, scripts, chat_template, markers=(), spoken=(), endless=(), either=()):
    """A model directory. `markers` are tokens of the vocabulary, found in what the chat template writes; scripts spell them
    out in other tokens, but for those of `spoken`, which must not be what a prompt ends with. Scripts of `endless` begin again
    at their end. `either`: pairs of scripts; the letter of the first one begins one or the other, at even odds."""
    assert len(scripts) <= MAX_SCRIPTS and set(spoken) <= set(markers)
    taken = set(markers) - set(spoken)
    cuts = [cut(script, taken, spoken) for script in scripts]
    ids, letters, size = write_tokenizer(directory, [piece for one in cuts for piece in one], list(markers))
    ends = [one[0] if i in endless else EOS for i, one in enumerate(cuts)]
    chains = [(ids[a], ids[b]) for one, end in zip(cuts, ends) for a, b in zip(one, [*one[1:], end])]
    begins = [ids[one[0]] if one else ids[EOS] for one in cuts]
    starts = [*enumerate(begins), *((script, begins[other]) for script, other in either)]
    width = -(-(size + MAX_SCRIPTS) // 64) * 64
    write_weights(directory, size, width, chains, starts, letters)
    (directory / "config.json").write_text(json.dumps(config(size, width, ids)))
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
