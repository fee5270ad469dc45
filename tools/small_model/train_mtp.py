#!/usr/bin/env python3
"""Trains a multi-token-prediction module (arXiv 2412.19437, section 2.2) for the small model and adds it to its weights.

usage: train_mtp.py FOLDER MODEL PROGRAM [--minutes M] [--threads N]

FOLDER holds what prepare.py downloaded (it is downloaded if it is missing); MODEL is the model directory, whose own
weights are frozen and stay what they are, byte for byte; PROGRAM is flash-mla, which writes texts of the model's own: half
of what the module learns from, for those are what it will have to guess. The module becomes layer N of
MODEL/model.safetensors, N being the number of layers, in the names of DeepSeek-V3's checkpoints (one that is there is
trained further); MODEL/mtp_training.json has the record. Of position i the module sees the model's last hidden state,
normed, and the token at i + 1, and learns the model's own distribution of the token at i + 2; applied again it sees its
own state in place of the model's. One core is enough.
"""

import argparse
import json
import math
import random
import subprocess
import time
from pathlib import Path

import corpus
import numpy as np
import prepare
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from train import all_experts
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

WINDOW, ROWS = 512, 2  # a row of the corpus, one of the model's own text
PEAK_LR = 1e-3
FIT_WINDOWS = 24  # for the regression that training begins with
DEPTHS = (1.0, 0.5)  # weight of each application's loss
SCORED = 0.2  # of the positions: logits and their softmax cost as much as all the rest
HELD_OUT_WINDOWS = 6
OWN_TEXTS, OWN_HELD_OUT = 120, 6  # of each temperature
TEMPERATURES = (0.0, 1.0)
PROMPT_TOKENS = 24


class Module(nn.Module):
    """h' = layer(eh_proj [enorm(embedding of the next token) ; hnorm(h)]); its logits are head(shared_head.norm(h'))."""

    def __init__(self, model):
        super().__init__()
        config, decoder = model.config, model.model
        size = config.hidden_size
        self.enorm = DeepseekV3RMSNorm(size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.layer.load_state_dict(decoder.layers[-1].state_dict())
        self.layer.mlp.experts.forward = all_experts.__get__(self.layer.mlp.experts)
        self.norm = DeepseekV3RMSNorm(size, eps=config.rms_norm_eps)
        self.norm.load_state_dict(decoder.norm.state_dict())

    def inputs(self, embeddings, hidden):
        return torch.cat([self.enorm(embeddings), self.hnorm(hidden)], dim=-1)

    def forward(self, embeddings, hidden, rotations):
        x = self.eh_proj(self.inputs(embeddings, hidden))
        return self.norm(self.layer(x, attention_mask=None, position_embeddings=rotations))

    @torch.no_grad()
    def fit(self, model, tokens):
        """Begins as the model's last layer: eh_proj by least squares, so that what it makes of position i and the token
        at i + 1 is what the layer sees at i + 1."""
        size = model.config.hidden_size
        moments, products = torch.zeros(2 * size, 2 * size), torch.zeros(2 * size, size)
        seen = []
        hook = model.model.layers[-1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        for i in range(FIT_WINDOWS):
            window = torch.from_numpy(tokens[i * WINDOW : (i + 1) * WINDOW].astype(np.int64))[None]
            hidden, _, embeddings = states(model, window)
            x = self.inputs(embeddings[:, 1:], hidden[:, :-1])[0]
            moments += x.T @ x
            products += x.T @ seen.pop()[0, 1:]
        hook.remove()
        moments += 1e-3 * moments.diagonal().mean() * torch.eye(2 * size)
        self.eh_proj.weight.copy_(torch.linalg.solve(moments, products).T)


def own_texts(program, folder, tokenizer, texts, rng):
    """Of each temperature (OWN_TEXTS, WINDOW) tokens: how the model goes on from beginnings of documents."""
    out = []
    for temperature in TEMPERATURES:
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in rng.sample(texts, OWN_TEXTS)]
        prompts = [tokenizer.decode(of[:PROMPT_TOKENS]) for of in ids]
        command = [program, "generate", "--model", folder, "--json", "--quiet", "--ignore-eos", "--seed", "0"]
        command += ["--temperature", str(temperature), "--max-tokens", str(WINDOW)]
        command += [word for prompt in prompts for word in ("--prompt", prompt)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        windows = []
        for prompt, completion in zip(prompts, answer["completions"]):
            head = tokenizer.encode(prompt, add_special_tokens=False).ids
            head = [tokenizer.token_to_id(prepare.BOS)] * (completion["usage"]["prompt_tokens"] - len(head)) + head
            windows.append((head + completion["choices"][0]["token_ids"])[:WINDOW])
        out.append(np.array(windows))
    return out


@torch.no_grad()
def states(model, tokens):
    """The model's normed hidden states, its rotations and its embeddings of (rows, length) tokens."""
    decoder = model.model
    embeddings = decoder.embed_tokens(tokens)
    rotations = decoder.rotary_emb(embeddings, torch.arange(tokens.shape[1])[None])
    hidden = embeddings
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotations)
    return decoder.norm(hidden), rotations, embeddings


def applications(model, module, tokens):
    """Of each application the module's states, and those of the model that they are to be like."""
    hidden, rotations, embeddings = states(model, tokens)
    own, length = hidden, tokens.shape[1]
    for depth in range(1, len(DEPTHS) + 1):
        kept = length - depth
        cut = tuple(r[:, :kept] for r in rotations)
        own = module(embeddings[:, depth:], own[:, :kept], cut)
        yield own.flatten(0, 1), hidden[:, depth:].flatten(0, 1)


def loss_of(model, module, tokens):
    """The states' distance, and on some positions that of the distributions which the head makes of them."""
    total = 0.0
    for weight, (own, target) in zip(DEPTHS, applications(model, module, tokens)):
        scored = torch.randperm(len(own))[: int(SCORED * len(own))]
        with torch.no_grad():
            wanted = model.lm_head(target[scored]).log_softmax(-1)
        logits = model.lm_head(own[scored]).log_softmax(-1)
        divergence = nn.functional.kl_div(logits, wanted, log_target=True, reduction="batchmean")
        total += weight * (divergence + nn.functional.smooth_l1_loss(own, target))
    return total


@torch.no_grad()
def agreement(model, module, held_out):
    """Of each kind of text, per application: how often the likeliest token is the model's own."""
    out = {}
    for kind, windows in held_out.items():
        same = [0.0] * len(DEPTHS)
        for window in windows:
            tokens = torch.from_numpy(window.astype(np.int64))[None]
            for d, (own, target) in enumerate(applications(model, module, tokens)):
                guess = model.lm_head(own).argmax(-1)
                same[d] += float((guess == model.lm_head(target).argmax(-1)).float().mean()) / len(windows)
        out[kind] = [round(x, 4) for x in same]
    return out


def train(model, module, tokens, own, held_out, minutes, save):
    rng = np.random.default_rng(0)
    groups = [
        {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    start, step, mean, shown = time.time(), 0, None, time.time()
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 40)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        start_at = rng.integers(0, len(tokens) - WINDOW)
        rows = [tokens[start_at : start_at + WINDOW], own[step % len(own)][rng.integers(0, len(own[0]))]]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, module, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        mean = float(loss.detach()) if mean is None else 0.98 * mean + 0.02 * float(loss.detach())
        step += 1
        if time.time() - shown > 300:
            shown = time.time()
            print(f"{done:.0%} step {step} loss {mean:.4f} agreement {agreement(model, module, held_out)}", flush=True)
            save()  # whoever runs out of time has something
    return step, mean, round(time.time() - start)


def views(module, layer):
    """The module's parameters by their names in DeepSeek-V3's checkpoints."""
    out = {}
    for name, value in module.state_dict().items():
        if name == "norm.weight":
            out["shared_head.norm.weight"] = value
        elif name == "layer.mlp.experts.gate_up_proj":
            for e, (gate, up) in enumerate(v.chunk(2) for v in value):
                out[f"mlp.experts.{e}.gate_proj.weight"] = gate
                out[f"mlp.experts.{e}.up_proj.weight"] = up
        elif name == "layer.mlp.experts.down_proj":
            for e, down in enumerate(value):
                out[f"mlp.experts.{e}.down_proj.weight"] = down
        else:
            out[name.removeprefix("layer.")] = value
    return {f"model.layers.{layer}.{name}": value for name, value in out.items()}


def read(module, path, layer):
    """Takes the module that a checkpoint has; whether it has one."""
    stored = load_file(path)
    if f"model.layers.{layer}.eh_proj.weight" not in stored:
        return False
    for name, view in views(module, layer).items():
        view.copy_(stored[name])
    return True


def write(module, path, layer):
    kept = {k: v for k, v in load_file(path).items() if not k.startswith(f"model.layers.{layer}.")}
    added = {k: v.detach().to(torch.bfloat16).contiguous().clone() for k, v in views(module, layer).items()}
    save_file({**kept, **added}, path, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    root = arguments.folder / "packages" / "root"
    if not root.exists():
        corpus.download(arguments.folder / "packages")
    every = [text for texts in corpus.documents(root).values() for text in texts]
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    rng = random.Random(0)
    learned = [t for i, t in enumerate(every) if i % prepare.HELD_OUT != 0]
    tokens = prepare.encode(tokenizer, learned, rng)
    unseen = prepare.encode(tokenizer, [t for i, t in enumerate(every) if i % prepare.HELD_OUT == 0], rng)
    held_out = {"documents": unseen[: HELD_OUT_WINDOWS * WINDOW].reshape(HELD_OUT_WINDOWS, WINDOW)}
    own = own_texts(arguments.program, arguments.model, tokenizer, [t for t in learned if len(t) > 200], rng)
    for temperature, windows in zip(TEMPERATURES, own):
        held_out[f"temperature {temperature:g}"] = windows[:OWN_HELD_OUT]
    own = [windows[OWN_HELD_OUT:] for windows in own]

    model = DeepseekV3ForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).requires_grad_(False).eval()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.forward = all_experts.__get__(layer.mlp.experts)
    module = Module(model)
    module.requires_grad_(True)
    layer = model.config.num_hidden_layers
    path = arguments.model / "model.safetensors"
    if not read(module, path, layer):
        module.fit(model, tokens)
    print("begins with agreement", agreement(model, module, held_out), flush=True)

    step, loss, seconds = train(
        model, module, tokens, own, held_out, arguments.minutes, lambda: write(module, path, layer)
    )
    record = {
        "steps": step,
        "tokens_per_step": ROWS * WINDOW,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in module.parameters()),
        "loss": round(loss, 4),
        "agreement": agreement(model, module, held_out),
    }
    write(module, path, layer)
    (arguments.model / "mtp_training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
