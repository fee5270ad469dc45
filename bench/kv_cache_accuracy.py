"""What a cache in fewer bits costs: how far logits move from those of float32 with a cache in float32.

    python bench/kv_cache_accuracy.py [--json FILE]

The trained models of the repository, over text that each of them wrote itself (in float32, temperature 0.8), and
random models in the shape of V3 and V3.2 whose weights have heavy tails: Student's t with 3 degrees of freedom, so that
a few latents are many times as large as the others of their tile. Divergences are means over all tokens but the first
of each text.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from provenance import commit, machine_with_torch
from safetensors.torch import save_file

from flash_mla_kernels import LLM, SamplingParams
from flash_mla_kernels.model import PAGE_SIZE, Model

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPTS = ["And it came to pass", "CHAPTER I\n\nEmma was", "And the LORD said unto", "CHAPTER II\n\nMr. Darcy"]
TOKENS = 512
FREEDOM = 3
SHAPE = dict(
    vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    q_lora_rank=256, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=None, max_position_embeddings=2048, rope_theta=10000.0,
)  # fmt: skip
SPARSE = dict(index_topk=128, index_n_heads=16, index_head_dim=128)
# precision, kv_cache
SETTINGS = [
    ("float32", "bfloat16"), ("float32", "float16"), ("float32", "fp8"), ("bfloat16", "auto"), ("bfloat16", "fp8"),
]  # fmt: skip


def write_random(directory, model_type):
    """A checkpoint of SHAPE with heavy tails."""
    generator = np.random.default_rng(0)
    sparse = model_type == "deepseek_v32"
    config = {"model_type": model_type, **SHAPE, **(SPARSE if sparse else {})}
    (directory / "config.json").write_text(json.dumps(config))
    c = SHAPE
    tensors = {}

    def weight(name, rows, columns):
        draws = generator.standard_t(FREEDOM, size=(rows, columns)) / np.sqrt(FREEDOM / (FREEDOM - 2) * columns)
        tensors[f"{name}.weight"] = torch.from_numpy(draws.astype(np.float32))

    def norm(name, size):
        draws = 1 + 0.2 * generator.standard_t(FREEDOM, size=size)
        tensors[f"{name}.weight"] = torch.from_numpy(draws.astype(np.float32))

    hidden, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    nope, v, rank, q_rank = c["qk_nope_head_dim"], c["v_head_dim"], c["kv_lora_rank"], c["q_lora_rank"]
    weight("model.embed_tokens", c["vocab_size"], hidden)
    tensors["model.embed_tokens.weight"] *= hidden**0.5
    weight("lm_head", c["vocab_size"], hidden)
    norm("model.norm", hidden)
    for i in range(c["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        weight(f"{attention}.q_a_proj", q_rank, hidden)
        norm(f"{attention}.q_a_layernorm", q_rank)
        weight(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
        weight(f"{attention}.kv_a_proj_with_mqa", rank + rope, hidden)
        norm(f"{attention}.kv_a_layernorm", rank)
        weight(f"{attention}.kv_b_proj", heads * (nope + v), rank)
        weight(f"{attention}.o_proj", hidden, heads * v)
        if sparse:
            index = f"{attention}.indexer"
            weight(f"{index}.wq_b", SPARSE["index_n_heads"] * SPARSE["index_head_dim"], q_rank)
            weight(f"{index}.wk", SPARSE["index_head_dim"], hidden)
            norm(f"{index}.k_norm", SPARSE["index_head_dim"])
            tensors[f"{index}.k_norm.bias"] = torch.zeros(SPARSE["index_head_dim"])
            weight(f"{index}.weights_proj", SPARSE["index_n_heads"], hidden)
        for part, rows, columns in (("gate", c["intermediate_size"], hidden), ("up", c["intermediate_size"], hidden),
                                    ("down", hidden, c["intermediate_size"])):  # fmt: skip
            weight(f"{layer}.mlp.{part}_proj", rows, columns)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def own_texts(directory):
    llm = LLM(directory, device="cpu", precision="float32", memory_bytes=256 << 20)
    params = SamplingParams(max_tokens=TOKENS - 16, temperature=0.8, seed=0, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, progress=False)
    return [[0, *llm.tokenize(p), *o.choices[0].token_ids] for p, o in zip(PROMPTS, outputs)]


def random_texts():
    generator = np.random.default_rng(1)
    return [generator.integers(0, SHAPE["vocab_size"], TOKENS).tolist() for _ in range(4)]


def log_probabilities(directory, texts, precision, kv_cache):
    model = Model(directory, precision=precision, kv_cache=kv_cache)
    logits = []
    for text in texts:
        pages = -(-len(text) // PAGE_SIZE)
        model.allocate_cache(pages)
        out = model.forward(text, [0, len(text)], [len(text)], [list(range(pages))])
        logits.append(torch.from_numpy(out)[1:])
    return torch.cat(logits).double(), model.bytes_per_page / PAGE_SIZE


def compare(exact, other):
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return {
        "kl_nats": float((p.exp() * (p - q)).sum(-1).mean()),
        "logit_rms_over_deviation": float((exact - other).pow(2).mean().sqrt() / exact.std()),
        "same_first_choice": float((exact.argmax(-1) == other.argmax(-1)).double().mean()),
    }


def figures(name, directory, texts):
    exact, exact_bytes = log_probabilities(directory, texts, "float32", "auto")
    out = {"model": name, "tokens": sum(map(len, texts)), "bytes_per_token_float32": exact_bytes, "settings": []}
    print(f"{name}: {out['tokens']} tokens")
    for precision, kv_cache in SETTINGS:
        other, size = log_probabilities(directory, texts, precision, kv_cache)
        row = {"precision": precision, "kv_cache": kv_cache, "bytes_per_token": size, **compare(exact, other)}
        out["settings"].append(row)
        print(f"  {precision:8} {kv_cache:8} {size:7.0f} B/token  KL {row['kl_nats']:.2e}  "
              f"logits {row['logit_rms_over_deviation']:.2e}  first choice {row['same_first_choice']:.4f}")  # fmt: skip
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    models = []
    for directory in (ROOT / "models" / "small", ROOT / "models" / "small-sparse"):
        models.append(figures(f"models/{directory.name}", directory, own_texts(directory)))
    for model_type in ("deepseek_v3", "deepseek_v32"):
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder)
            write_random(directory, model_type)
            models.append(figures(f"random {model_type}, heavy tails", directory, random_texts()))
    if arguments.json:
        report = {"command": " ".join(sys.argv), "commit": commit(), "machine": machine_with_torch(), "models": models}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
