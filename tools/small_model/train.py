#!/usr/bin/env python3
"""Trains the small DeepSeek-V3-shaped model on what prepare.py left, and writes it as a model directory.

usage: train.py FOLDER [--steps N] [--minutes M] [--dropout P] [--tokens-per-step N] [--eager]

Reads FOLDER/tokens.npz; writes config.json, generation_config.json, model.safetensors (bfloat16) and
training.json beside the tokenizer in FOLDER/model. Needs torch and transformers; a GPU makes it minutes.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

CONTEXT = 2048
PEAK_LR, WEIGHT_DECAY = 3e-3, 0.1
BIAS_STEP = 1e-3  # of the routers' correction bias, arXiv 2412.19437 section 2.1.2

# About 7 million weights. The cache's widths are those of the published models, so that it runs their kernels.
CONFIG = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=96,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=128,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    max_position_embeddings=CONTEXT,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    initializer_range=0.05,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def all_experts(self, hidden_states, top_k_index, top_k_weights):
    """Every expert on every token, unchosen ones weighted zero: on a GPU faster for so few than gathering."""
    gates = hidden_states.new_zeros(hidden_states.shape[0], self.num_experts)
    gates = gates.scatter(1, top_k_index, top_k_weights.to(gates.dtype))
    gate, up = torch.einsum("th,eih->eti", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
    out = torch.einsum("eti,ehi->eth", nn.functional.silu(gate) * up, self.down_proj)
    return torch.einsum("eth,te->th", out, gates)


class Balance:
    """Loss-free load balancing: experts chosen more than the mean get a lower bias, the others a higher."""

    def __init__(self, model):
        self.routers = [m for m in model.modules() if type(m).__name__ == "DeepseekV3TopkRouter"]
        self.loads = {}
        for router in self.routers:
            router.register_forward_hook(self.count)

    def count(self, router, _, output):
        if torch.is_grad_enabled():
            chosen = nn.functional.one_hot(output[2], router.num_experts)
            self.loads[router] = chosen.sum(dim=(0, 1)).float()

    def step(self):
        for router, load in self.loads.items():
            router.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)

    def worst(self):
        """Largest share of an expert over the mean share."""
        return max(float(load.max() / load.mean()) for load in self.loads.values())


def add_dropout(model, share):
    def drop(module, _, output):
        p = share if module.training else 0.0
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], p), *output[1:])
        return nn.functional.dropout(output, p)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def build():
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG))
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3Experts":
            module.forward = all_experts.__get__(module)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter.data /= math.sqrt(2 * CONFIG["num_hidden_layers"])
    return model


def loss_of(model, batch):
    """Mean cross entropy of (rows, CONTEXT + 1) tokens, in nats. Layer by layer: no masks are made on the way, so
    that nothing waits for the GPU."""
    decoder = model.model
    positions = torch.arange(batch.shape[1] - 1, device=batch.device)[None]
    with torch.autocast(batch.device.type, torch.bfloat16, cache_enabled=False):
        hidden = decoder.embed_tokens(batch[:, :-1])
        rotations = decoder.rotary_emb(hidden, positions)
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotations)  # None: causal
        logits = model.lm_head(decoder.norm(hidden))
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model, tokens, device):
    """Nats per token over the held-out documents, in windows of CONTEXT."""
    model.eval()
    count = (len(tokens) - 1) // CONTEXT
    total = 0.0
    for i in range(count):
        window = tokens[i * CONTEXT : (i + 1) * CONTEXT + 1].astype(np.int64)
        total += float(loss_of(model, torch.from_numpy(window)[None].to(device)))
    model.train()
    return total / count


def optimizer_of(model, device):
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The rate as a tensor, so that a captured step sees it change.
    rate = torch.tensor(PEAK_LR, device=device)
    gpu = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), capturable=gpu, foreach=gpu)


class TrainingStep:
    """One update on `batch`. On a GPU it is captured once and replayed: the model is so small that launching its
    kernels one by one takes several times as long as running them."""

    def __init__(self, model, balance, optimizer, batch, capture):
        self.model, self.balance, self.optimizer, self.batch = model, balance, optimizer, batch
        self.graph = None
        if capture:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.update()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.update()

    def update(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss_of(self.model, self.batch)
        self.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.balance.step()

    def __call__(self):
        if self.graph is None:
            self.update()
        else:
            self.graph.replay()
        return self.loss


def learning_rate(done):
    """Warm-up over 3 % of the run, then a cosine down to 2 %."""
    if done < 0.03:
        return PEAK_LR * max(done / 0.03, 0.01)
    return PEAK_LR * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.03) / 0.97)))


def train(model, train_tokens, held_out, device, arguments):
    rng = np.random.default_rng(0)
    balance, optimizer = Balance(model), optimizer_of(model, device)
    rows = max(arguments.tokens_per_step // CONTEXT, 1)
    batch = torch.zeros(rows, CONTEXT + 1, dtype=torch.long, device=device)
    optimizer.param_groups[0]["lr"].fill_(learning_rate(0))
    update = TrainingStep(model, balance, optimizer, batch, device.type == "cuda" and not arguments.eager)
    best, best_state, history = math.inf, None, []
    start, step, mean = time.time(), 0, None
    while True:
        # Whichever of the two limits comes first sets the pace of the schedule.
        done = max(step / arguments.steps, (time.time() - start) / (60 * arguments.minutes))
        last = done >= 1
        if last or step % arguments.evaluate_every == 0 and step > 0:
            loss = validation_loss(model, held_out, device)
            history.append({"step": step, "train": mean, "validation": loss})
            print(
                f"step {step} {time.time() - start:.0f} s train {mean:.4f} validation {loss:.4f} "
                f"busiest expert {balance.worst():.2f} of the mean",
                flush=True,
            )
            if loss < best:
                best = loss
                best_state = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        if last:
            break
        for group in optimizer.param_groups:
            group["lr"].fill_(learning_rate(done))
        starts = rng.integers(0, len(train_tokens) - CONTEXT - 1, rows)
        windows = np.stack([train_tokens[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
        batch.copy_(torch.from_numpy(windows))
        loss = update()
        if step % 10 == 0:
            value = float(loss.detach())
            mean = value if mean is None else 0.9 * mean + 0.1 * value
        step += 1
    model.load_state_dict(best_state)
    return {
        "steps": step,
        "tokens_per_step": rows * CONTEXT,
        "dropout": arguments.dropout,
        "seconds": round(time.time() - start),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": round(mean, 4),
        "validation_loss": round(best, 4),
        "history": history,
    }


@torch.no_grad()
def sample(model, folder, prompt, device):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    ids = torch.tensor([[0, *tokenizer.encode(prompt, add_special_tokens=False).ids]], device=device)
    out = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.7, top_p=0.9)
    return tokenizer.decode(out[0].tolist(), skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--minutes", type=float, default=1.9, help="stop here if the steps take longer")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--dropout", type=float, default=0.2, help="of what each sublayer adds")
    parser.add_argument("--evaluate-every", type=int, default=1000)
    parser.add_argument("--eager", action="store_true", help="launch kernel by kernel, capture nothing")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    tokens = np.load(arguments.folder / "tokens.npz")
    model = build().to(device)
    add_dropout(model, arguments.dropout)
    model.train()
    record = train(model, tokens["train"], tokens["validation"], device, arguments)
    model.eval()
    model = model.to(torch.bfloat16)
    out = arguments.folder / "model"
    model.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "history"}))
    for prompt in ("It is a truth universally acknowledged", "And the LORD said unto", "Emma was"):
        print("---", sample(model, arguments.folder, prompt, device), flush=True)


if __name__ == "__main__":
    main()
