"""Several ranks that share a model, from Python and behind a server."""

import json
import re
import threading
from pathlib import Path

import pytest
from live_server import Server, wait_for

from flash_mla_kernels import LLM, SamplingParams, planner

SMALL = Path(__file__).resolve().parents[2] / "models" / "small"
PROMPTS = ["In the beginning", "And it came to pass", "CHAPTER I", "Blessed are the", "And the sons of"] * 2


def test_every_number_of_ranks_writes_the_same():
    def tokens(**ranks):
        llm = LLM(SMALL, device="cpu", precision="float32", num_pages=16, batch_invariant=True, num_threads=2, **ranks)
        out = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), progress=False)
        return [o.choices[0].token_ids for o in out], llm

    one, llm = tokens()
    assert llm.stats()["ranks"] == []
    assert tokens(tp=2)[0] == one
    for ranks in ({"dp": 2}, {"dp": 4, "ep": 2, "expert_placement": "round-robin"}):
        many, llm = tokens(**ranks)
        assert many == one
        stats = llm.stats()
        assert len(stats["ranks"]) == ranks["dp"]
        assert stats["pages_total"] == 16 * ranks["dp"]
        for rank in stats["ranks"]:
            assert rank["pages_total"] == 16 and rank["pages_used"] == 0
            assert rank["computed_tokens"] > 0 and rank["bytes_sent"] > 0
        pids = {e["pid"] for e in json.loads(llm.chrome_trace())["traceEvents"]}
        assert len(pids) == ranks["dp"]


def test_gpus_of_ranks_are_of_a_gpu():
    with pytest.raises(ValueError, match="devices has 2 GPUs, expected none: device is cpu"):
        LLM(SMALL, device="cpu", tp=2, devices=[0, 0])


def test_a_server_tells_what_its_ranks_do():
    server = Server(SMALL, "--device", "cpu", "--dp", "2", "--threads", "2", num_pages=32)
    try:
        answers = []

        def ask(prompt):
            answers.append(
                server.json("/v1/completions", {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0})
            )

        threads = [threading.Thread(target=ask, args=(p,)) for p in PROMPTS]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(answers) == len(PROMPTS)
        server.wait_until_idle()
        by_rank = [server.metric(f'mla_rank_computed_tokens_total{{rank="{r}"}}') for r in range(2)]
        assert min(by_rank) > 0 and sum(by_rank) == server.metric("mla_computed_tokens_total")
        assert server.metric("mla_cache_pages") == 64
        assert server.metric('mla_rank_cache_pages{rank="1"}') == 32
        assert server.metric('mla_rank_cache_pages_used{rank="0"}') == 0
    finally:
        server.stop()


@pytest.mark.parametrize("flags", [(), ("--tp", "2"), ("--dp", "2"), ("--tp", "2", "--dp", "2")])
def test_a_server_says_its_bytes_beside_the_planners(flags):
    server = Server(SMALL, "--device", "cpu", "--precision", "bf16", "--threads", "2", *flags)
    try:
        pattern = (
            r"([\d.]+) MB of weights and ([\d.]+) MB of cache( on each of [24] ranks)?; planner.*: ([\d.]+) and ([\d.]+)\n"
        )
        wait_for(lambda: re.search(pattern, server.log.read_text()), server.log.read_text())
        weights, cache, on_each, planned_weights, planned_cache = re.search(pattern, server.log.read_text()).groups()
        assert bool(on_each) == bool(flags)
        # The planner counts latents on every rank whole, as the engine has them.
        assert float(cache) == pytest.approx(float(planned_cache), rel=0.02, abs=0.06)
        # The small model's head has the embedding's weights: two copies in the engine. And with --tp it has the embedding,
        # and what makes latents, on every rank.
        config = json.loads((SMALL / "config.json").read_text())
        copy = config["vocab_size"] * config["hidden_size"] * 2 / 1e6
        planned = float(planned_weights) + copy
        assert float(weights) == pytest.approx(planned, abs=0.11) or (
            "--tp" in flags and planned < float(weights) < 1.15 * planned
        )
    finally:
        server.stop()


def test_what_ranks_cannot_do_is_refused():
    with pytest.raises(ValueError, match="ep is 3, expected 0 or a divisor of 4, tp times dp"):
        LLM(SMALL, device="cpu", dp=2, tp=2, ep=3)
    with pytest.raises(ValueError, match="dp is 0, expected"):
        LLM(SMALL, device="cpu", dp=0)


def test_a_plan_says_how_it_is_started():
    start = planner.plan(model="deepseek-v3", hardware="h200", ep=8, batch=32, input=4000, output=1000)["start"]
    assert start["command"] == (
        "flash-mla serve --model DIR --dp 8 --ep 8 --quantize fp8 --kv-cache fp8 --max-batch-size 32 "
        "--num-pages 2528 --max-tokens-per-step 4032"
    )
    assert len(start["caveats"]) == 2 and "8 ranks" in start["caveats"][0]
    start = planner.plan(model="deepseek-v2-lite", hardware="h200", dense="bf16", moe="bf16", kv="bf16", chunk=512)[
        "start"
    ]
    assert start["caveats"] == []
    assert start["command"] == (
        "flash-mla serve --model DIR --max-batch-size 32 --num-pages 2208 --max-tokens-per-step 544"
    )
    drafting = planner.plan(model="deepseek-v3", hardware="h200", tp=8, ep=8, mtp_draft=2, mtp_acceptance=0.8)["start"]
    assert " --tp 8 --ep 8 " in drafting["command"] and " --speculative mtp --draft-tokens 2 " in drafting["command"]
    start = planner.plan(model="deepseek-v3", hardware="h200", tp=4, ep=16)["start"]
    assert " --tp 4 --dp 4 --ep 16 " in start["command"] and "16 ranks" in start["caveats"][0]
    start = planner.plan(model="deepseek-v3", hardware="h200", tp=4, ep=16, kv="fp8_576")["start"]
    assert start["command"] == ""
    assert "fp8_576" in start["caveats"][-1]
