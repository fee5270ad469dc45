"""Decoding of transformers' generate() on a GPU, for a model of DeepSeek-V2-Lite's shape with random weights, beside
what `flash-mla bench-engine` measured on the same GPU.

    flash-mla bench-engine --batch 32 --context 1024 --json ours.json
    python3 bench/compare_transformers_gpu.py --ours ours.json --json compare.json

A decode step is the difference between generating --new and one token, over the steps between, so that the prefill
is not counted; the quickest of transformers' implementations of the experts counts. bfloat16, sdpa, greedy.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time

import torch
import transformers

V2_LITE = {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "max_position_embeddings": 163840,
}  # fmt: skip
EXPERTS = ("grouped_mm", "batched_mm", "eager")


def make_model(experts):
    config = transformers.DeepseekV2Config(**V2_LITE)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts
        )
    rotary = type(model.model.rotary_emb)(config=config, device="cuda")
    model.to_empty(device="cuda").eval()
    model.model.rotary_emb = rotary
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02)
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def seconds(model, ids, new):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    torch.cuda.synchronize()
    if out.shape[1] != ids.shape[1] + new:
        raise RuntimeError("generate() did not give the tokens asked for")
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=17, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ours", help="JSON of flash-mla bench-engine")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    steps = {}
    for experts in EXPERTS:
        try:
            model = make_model(experts)
            ids = torch.randint(0, V2_LITE["vocab_size"], (arguments.batch, arguments.context), device="cuda")
            seconds(model, ids, 3)
            times = []
            for _ in range(arguments.rounds):
                first = seconds(model, ids, 1)
                times.append((seconds(model, ids, arguments.new) - first) / (arguments.new - 1))
            steps[experts] = statistics.median(times)
            print(f"transformers {experts}: {1e3 * steps[experts]:.2f} ms a step", flush=True)
        except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            print(f"transformers with experts_implementation={experts!r}: {error}", file=sys.stderr)
        model = None
        torch.cuda.empty_cache()
    best = min(steps, key=steps.get)
    out = {
        "command": shlex.join(sys.argv),
        "machine": {"host": platform.processor(), "gpu": torch.cuda.get_device_name()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": arguments.batch,
        "context": arguments.context,
        "step_seconds": steps,
        "best": best,
        "tokens_per_second": arguments.batch / steps[best],
    }
    print(f"transformers, {best}: {out['tokens_per_second']:.0f} tokens/s at batch {arguments.batch}")
    if arguments.ours:
        with open(arguments.ours) as file:
            rows = json.load(file)["decode"]
        ours = next(r for r in rows if r["batch"] == arguments.batch and r["context"] == arguments.context)
        out["ours_tokens_per_second"] = ours["tokens_per_second"]
        out["ratio"] = ours["tokens_per_second"] / out["tokens_per_second"]
        print(f"ours: {ours['tokens_per_second']:.0f} tokens/s, {out['ratio']:.1f} times that")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(out, file, indent=2)


if __name__ == "__main__":
    main()
