#!/usr/bin/env python3
"""Makes a model with sparse attention out of the trained small one: an indexer that begins as a sketch of its attention
and learns what that looks at, and then all weights on attention over the chosen tokens alone.

usage: add_indexer.py FOLDER [--minutes M] [--top-k K]

Reads models/small and the text (downloaded to FOLDER/packages, as prepare.py does); writes FOLDER/sparse: a
model directory of the type deepseek_v32. Needs torch, transformers and tokenizers, and some minutes of one core.
"""

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from prepare import HELD_OUT, encode
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from train import all_experts
from transformers import DeepseekV3ForCausalLM

SMALL = Path(__file__).resolve().parents[2] / "models" / "small"
WINDOWS = [512, 512, 512, 1024]  # tokens, in turn; attention over the chosen ones costs as much as over all here
KEPT_WINDOWS = 16  # whose attention is computed once, for the indexers to learn from over and over
HELD_OUT_WINDOW, HELD_OUT_WINDOWS = 1024, 2
HEADS, WIDTH = 4, 128  # of the indexer
SAMPLED_ROWS = 256  # of a window, whose distribution the indexer learns at a time
INDEXER_LR, SPARSE_LR = 1e-3, 3e-4


class Indexer(nn.Module):
    """The lightning indexer of DeepSeek V3.2: score[i, j] = sum over heads of weight[i, h] * relu(q[i, h] . k[j])."""

    def __init__(self, config):
        super().__init__()
        self.wq_b = nn.Linear(config.q_lora_rank, HEADS * WIDTH, bias=False)
        self.wk = nn.Linear(config.hidden_size, WIDTH, bias=False)
        self.k_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, HEADS, bias=False)

    def keys(self, hidden, rotation):
        return turn_halves(self.k_norm(self.wk(hidden)), rotation)

    def scores(self, hidden, compressed, keys, rotation):
        """(rows, keys) of the rows given."""
        q = self.wq_b(compressed).view(-1, HEADS, WIDTH).transpose(0, 1)
        q = turn_halves(q, rotation)
        weights = self.weights_proj(hidden) * (HEADS * WIDTH) ** -0.5
        return torch.einsum("hik,ih->ik", torch.relu(q @ keys.T), weights)


def turn_halves(x, rotation):
    """RoPE on the first dimensions, whose pairs are (i, i + half): unlike the attention's, which are neighbours."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def turn_neighbours(x, rotation):
    cos, sin = rotation
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def index_loss(indexer, lesson):
    """KL divergence from the attention's distribution to the indexer's."""
    hidden, compressed, rotation, rows, allowed, target = lesson
    keys = indexer.keys(hidden, rotation)
    turned = tuple(t[rows] for t in rotation)
    scores = indexer.scores(hidden[rows], compressed[rows], keys, turned)
    log_p = scores.masked_fill(~allowed, -math.inf).log_softmax(dim=-1).clamp(min=-1e4)
    return (torch.xlogy(target, target) - target * log_p).sum(dim=-1).mean()


@torch.no_grad()
def sketch(indexer, attention, config, hidden):
    """Sets an indexer to what its attention computes, as far as one key for all heads can have it: the key's rope part is
    the attention's own, the rest the directions in which the heads' keys differ most; heads weigh alike. `hidden`: some
    of the layer's normalised inputs."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, rest = config.kv_lora_rank, WIDTH - config.qk_rope_head_dim
    order = torch.cat([torch.arange(0, rope, 2), torch.arange(1, rope, 2)])  # neighbours become halves
    down = attention.kv_a_proj_with_mqa.weight
    latents = hidden @ down[:rank].T
    factor = latents.pow(2).mean(dim=-1).rsqrt().mean()
    up = attention.kv_b_proj.weight.view(heads, -1, rank)[:, :nope].flatten(0, 1)
    keys = factor * up @ (attention.kv_a_layernorm.weight[:, None] * down[:rank])  # (heads * nope, hidden), nearly
    values, directions = torch.linalg.eigh(torch.cov((hidden @ keys.T).T))
    basis = directions[:, values.argsort(descending=True)[:rest]]
    indexer.wk.weight.copy_(torch.cat([down[rank:][order], basis.T @ keys]))
    q = attention.q_b_proj.weight.view(heads, nope + rope, -1)
    for h in range(HEADS):
        own = basis.view(heads, nope, rest)[h % heads]
        indexer.wq_b.weight.view(HEADS, WIDTH, -1)[h].copy_(
            torch.cat([q[h % heads, nope:][order], own.T @ q[h % heads, :nope]])
        )
    k = hidden @ indexer.wk.weight.T
    indexer.k_norm.weight.fill_(float(k.std(dim=-1).mean()))
    # Weights that are nearly the same for all tokens: the attention's own scale, over the indexer's.
    wanted = torch.full((hidden.shape[0], 1), (HEADS * WIDTH) ** 0.5 * (nope + rope) ** -0.5)
    square = hidden.T @ hidden + 1e-2 * hidden.shape[0] * torch.eye(hidden.shape[1])
    indexer.weights_proj.weight.copy_(torch.linalg.solve(square, hidden.T @ wanted).T.expand(HEADS, -1))


class Attention:
    """The latent attention of one layer on one window, dense or over what the indexer chooses."""

    def __init__(self, module, config, indexer, top_k):
        self.module, self.config, self.indexer, self.top_k = module, config, indexer, top_k

    def project(self, hidden, rotation):
        m, c = self.module, self.config
        compressed = m.q_a_layernorm(m.q_a_proj(hidden))
        q = m.q_b_proj(compressed).view(-1, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
        q_nope, q_rope = q.transpose(0, 1).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_rope = m.kv_a_proj_with_mqa(hidden).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = m.kv_b_proj(m.kv_a_layernorm(latent))
        kv = kv.view(-1, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim).transpose(0, 1)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = turn_neighbours(k_rope, rotation).expand(c.num_attention_heads, -1, -1)
        q = torch.cat([q_nope, turn_neighbours(q_rope, rotation)], dim=-1)
        return compressed, q, torch.cat([k_nope, k_rope], dim=-1), v

    def distribution(self, q, k, rows, allowed):
        """Of the rows given: what their heads look at, on the average."""
        scores = q[:, rows].float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5
        return scores.masked_fill(~allowed, -math.inf).softmax(dim=-1).mean(dim=0)

    @torch.no_grad()
    def lesson(self, hidden, compressed, q, k, rotation, rows, allowed):
        """What the indexer learns from: its inputs, and the attention's distribution. Neither the attention nor what
        comes before it learns from that."""
        return hidden.detach(), compressed.detach(), rotation, rows, allowed, self.distribution(q, k, rows, allowed)

    @torch.no_grad()
    def chosen(self, hidden, compressed, rotation, causal):
        """(rows, keys): the top_k of every row."""
        hidden, compressed = hidden.float(), compressed.float()
        keys = self.indexer.keys(hidden, rotation)
        scores = self.indexer.scores(hidden, compressed, keys, rotation).masked_fill(~causal, -math.inf)
        top = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(causal).scatter_(1, top, True) & causal


class SparseModel(nn.Module):
    def __init__(self, model, top_k):
        super().__init__()
        self.model, self.top_k = model, top_k
        self.indexers = nn.ModuleList(Indexer(model.config) for _ in model.model.layers)

    def forward(self, tokens, attend, rows=None):
        """`attend`: "dense", "sparse" or "window" (the last top_k tokens). Returns logits, and where `rows` is given
        each layer's lesson of those rows; with "dense" them alone."""
        decoder, config = self.model.model, self.model.config
        n = tokens.shape[0]
        with torch.no_grad():
            cos, sin = decoder.rotary_emb(torch.zeros(1, n, 1), torch.arange(n)[None])
        half = config.qk_rope_head_dim // 2
        rotation = cos[0, :, :half].float(), sin[0, :, :half].float()
        at = torch.arange(n)
        causal = at[:, None] >= at[None]
        near = at[:, None] - at[None] < self.top_k
        hidden, lessons = decoder.embed_tokens(tokens), []
        for layer, indexer in zip(decoder.layers, self.indexers):
            attention = Attention(layer.self_attn, config, indexer, self.top_k)
            normed = layer.input_layernorm(hidden)
            compressed, q, k, v = attention.project(normed, rotation)
            mask = None
            if attend == "sparse":
                mask = attention.chosen(normed, compressed, rotation, causal)
            elif attend == "window":
                mask = causal & near
            if rows is not None:
                allowed = causal[rows] if mask is None else mask[rows]
                lessons.append(attention.lesson(normed, compressed, q, k, rotation, rows, allowed))
            q, k, v = q[None], k[None], v[None].to(q.dtype)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            out = layer.self_attn.o_proj(out[0].transpose(0, 1).flatten(1))
            hidden = hidden + self.drop(out)
            hidden = hidden + self.drop(layer.mlp(layer.post_attention_layernorm(hidden)[None])[0])
        if rows is not None and attend == "dense":
            return None, lessons
        return self.model.lm_head(decoder.norm(hidden)), lessons

    def index_loss(self, lessons):
        return sum(index_loss(indexer, lesson) for indexer, lesson in zip(self.indexers, lessons))

    def drop(self, x):
        return nn.functional.dropout(x, self.dropout if self.training else 0.0)


def text_loss(logits, window):
    return nn.functional.cross_entropy(logits.float(), window[1:])


@torch.no_grad()
def held_out_loss(sparse, tokens, attend):
    """Nats per token, over windows that lie evenly in the text."""
    sparse.eval()
    losses = []
    for i in range(HELD_OUT_WINDOWS):
        start = i * (len(tokens) - HELD_OUT_WINDOW - 1) // HELD_OUT_WINDOWS
        window = torch.from_numpy(tokens[start : start + HELD_OUT_WINDOW + 1].astype(np.int64))
        logits, _ = sparse(window[:-1], attend)
        losses.append(float(text_loss(logits, window)))
    sparse.train()
    return sum(losses) / len(losses)


def rate(peak, done):
    """Warm-up over 3 % of a stage, then a cosine down to 2 %."""
    if done < 0.03:
        return peak * max(done / 0.03, 0.01)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.03) / 0.97)))


def stage(sparse, tokens, minutes, groups, attend, rng):
    """Trains for `minutes`, of the processor's time and of the clock's, the parameters of `groups`, (parameters, peak rate): the indexers on the dense attention's
    distribution, or with "sparse" everything."""
    optimizer = torch.optim.AdamW(
        [{"params": list(p), "lr": 0.0, "weight_decay": 0.0} for p, _ in groups], betas=(0.9, 0.95)
    )
    begin, clock, step, text, divergence, kept = time.process_time(), time.time(), 0, None, None, []
    while True:
        done = max((time.process_time() - begin) / (60 * minutes[0]), (time.time() - clock) / (60 * minutes[1]))
        if done >= 1:
            break
        for group, (_, peak) in zip(optimizer.param_groups, groups):
            group["lr"] = rate(peak, done)
        if len(kept) == KEPT_WINDOWS:
            lessons, loss = kept[int(rng.integers(KEPT_WINDOWS))], torch.zeros(())
        else:
            size = WINDOWS[step % len(WINDOWS)]
            start = int(rng.integers(0, len(tokens) - size - 1))
            window = torch.from_numpy(tokens[start : start + size + 1].astype(np.int64))
            rows = torch.from_numpy(np.sort(rng.choice(size, SAMPLED_ROWS, replace=False)))
            logits, lessons = sparse(window[:-1], attend, rows)
            loss = torch.zeros(()) if logits is None else text_loss(logits, window)
            if attend == "dense":
                kept.append(lessons)
        index = sparse.index_loss(lessons)
        optimizer.zero_grad(set_to_none=True)
        (loss + index).backward()
        for p, _ in groups:
            nn.utils.clip_grad_norm_(p, 1.0)
        optimizer.step()
        text = float(loss.detach()) if text is None else 0.98 * text + 0.02 * float(loss.detach())
        divergence = float(index.detach()) if divergence is None else 0.98 * divergence + 0.02 * float(index.detach())
        step += 1
        if step % 10 == 0:
            print(
                f"{attend} {step} {time.process_time() - begin:.0f} s text {text:.4f} indexers {divergence:.4f}",
                flush=True,
            )
    seconds = round(time.process_time() - begin)
    out = {"steps": step, "seconds": seconds, "index_loss": round(divergence, 4)}
    return {**out, "text_loss": round(text, 4)} if attend == "sparse" else out


def save(sparse, folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(SMALL / name, folder / name)
    config = json.loads((SMALL / "config.json").read_text())
    config["architectures"], config["model_type"] = ["DeepseekV32ForCausalLM"], "deepseek_v32"
    config.update(index_topk=sparse.top_k, index_n_heads=HEADS, index_head_dim=WIDTH)
    (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    # As models/small names and cuts its tensors; save_pretrained turns the experts' back into one each.
    sparse.model.to(torch.bfloat16).save_pretrained(folder / "saved")
    tensors = load_file(folder / "saved" / "model.safetensors")
    sparse.model.to(torch.float32)
    for i, indexer in enumerate(sparse.indexers):
        for name, value in indexer.state_dict().items():
            tensors[f"model.layers.{i}.self_attn.indexer.{name}"] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder / "saved")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=36, help="of the processor's time, both stages together")
    parser.add_argument("--clock-minutes", type=float, default=600, help="the same by the clock; what ends first")
    parser.add_argument("--indexers-only", action="store_true", help="leave the model's own weights as they are")
    parser.add_argument("--top-k", type=int, default=128, help="tokens that a token attends to")
    parser.add_argument("--dropout", type=float, default=0.2, help="of what each sublayer adds, in the second stage")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    root = arguments.folder / "packages" / "root"
    if not root.exists():
        corpus.download(arguments.folder / "packages")
    every = [text for texts in corpus.documents(root).values() for text in texts]
    tokenizer, seed = Tokenizer.from_file(str(SMALL / "tokenizer.json")), random.Random(0)
    tokens = encode(tokenizer, [text for i, text in enumerate(every) if i % HELD_OUT != 0], seed)
    held_out = encode(tokenizer, [text for i, text in enumerate(every) if i % HELD_OUT == 0], seed)

    model = DeepseekV3ForCausalLM.from_pretrained(SMALL, dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3Experts":
            module.forward = all_experts.__get__(module)
    sparse = SparseModel(model, arguments.top_k)
    sparse.dropout = 0.0
    record = {"device": "cpu", "threads": torch.get_num_threads(), "top_k": arguments.top_k}
    record["held_out_dense_before"] = round(held_out_loss(sparse, held_out, "dense"), 4)
    print(record, flush=True)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.requires_grad_(False)
    window = torch.from_numpy(tokens[: 2 * WINDOWS[-1]].astype(np.int64))
    with torch.no_grad():
        _, lessons = sparse(window, "dense", torch.arange(1))
    for layer, indexer, lesson in zip(model.model.layers, sparse.indexers, lessons):
        sketch(indexer, layer.self_attn, model.config, lesson[0])
    record["held_out_sparse_of_the_sketch"] = round(held_out_loss(sparse, held_out, "sparse"), 4)
    print(record, flush=True)
    indexers = list(sparse.indexers.parameters())
    record["indexer_stage"] = stage(
        sparse,
        tokens,
        (0.55 * arguments.minutes, 0.55 * arguments.clock_minutes),
        [(indexers, INDEXER_LR)],
        "dense",
        rng,
    )
    record["held_out_sparse_after_indexer_stage"] = round(held_out_loss(sparse, held_out, "sparse"), 4)
    print(record, flush=True)
    save(sparse, arguments.folder / "sparse", record)
    if arguments.indexers_only:
        return
    for name, p in model.named_parameters():
        p.requires_grad_("e_score_correction_bias" not in name)
    sparse.dropout = arguments.dropout
    groups = [([p for p in model.parameters() if p.requires_grad], SPARSE_LR), (indexers, SPARSE_LR)]
    minutes = 0.45 * arguments.minutes, 0.45 * arguments.clock_minutes
    record["sparse_stage"] = stage(sparse, tokens, minutes, groups, "sparse", rng)
    record["held_out_sparse"] = round(held_out_loss(sparse, held_out, "sparse"), 4)
    record["parameters"] = sum(p.numel() for p in sparse.parameters())
    save(sparse, arguments.folder / "sparse", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
