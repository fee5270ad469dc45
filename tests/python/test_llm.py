"""Generation on small random checkpoints: against transformers, and against itself under other schedules."""

import json

import numpy as np
import pytest
import torch
from checkpoints import edit_weights, expected_greedy, expected_logits, write_checkpoint
from letters import write_tokenizer

from flash_mla_kernels import LLM, SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("letters")
    oracle = write_checkpoint("letters", directory)
    tokenizer = write_tokenizer(directory)
    return directory, oracle, tokenizer


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model[0], precision="float32", num_pages=64, batch_invariant=True)


def greedy(max_tokens=24, **kw):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **kw)


def prompts(count, seed=0, longest=300):
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 256, 200).tolist()
    out = []
    for i in range(count):
        own = rng.integers(0, 256, int(rng.integers(1, longest))).tolist()
        out.append((common + own if i % 2 else own)[: longest])
    return out


def test_greedy_is_that_of_transformers(model, llm):
    _, oracle, _ = model
    some = prompts(6)
    for prompt, output in zip(some, llm.generate(some, greedy(64), progress=False)):
        assert output.choices[0].token_ids == expected_greedy(oracle, prompt, 64)
        assert output.choices[0].finish_reason == "length"
        assert output.prompt_tokens == len(prompt) and output.completion_tokens == 64


def test_ranks_write_what_one_writes(model, llm):
    some = prompts(4)
    ranks = LLM(model[0], device="cpu", precision="float32", num_pages=64, batch_invariant=True, tp=2, num_threads=2)
    expected = llm.generate(some, greedy(), progress=False)
    for a, b in zip(expected, ranks.generate(some, greedy(), progress=False)):
        assert a.choices[0].token_ids == b.choices[0].token_ids
    assert [rank["bytes_sent"] > 0 for rank in ranks.stats()["ranks"]] == [True, True]
    assert llm.stats()["ranks"] == []
    with pytest.raises(ValueError, match="ep is 3, expected 0 or a divisor of 2, tp times dp"):
        LLM(model[0], device="cpu", tp=2, ep=3)


def test_same_tokens_under_every_schedule(model, llm):
    some = prompts(10, seed=1, longest=250)
    params = [
        greedy(130) if i % 2 else SamplingParams(max_tokens=130, seed=i, top_p=0.9, ignore_eos=True)
        for i in range(len(some))
    ]
    alone = LLM(model[0], precision="float32", num_pages=64, prefix_cache=False, batch_invariant=True)
    expected = [alone.generate(p, s, progress=False)[0].choices[0].token_ids for p, s in zip(some, params)]

    def check(what, **options):
        other = LLM(model[0], precision="float32", batch_invariant=True, **{"num_pages": 128, **options})
        got = [o.choices[0].token_ids for o in other.generate(some, params, progress=False)]
        assert got == expected, what
        return other.stats()

    check("batched", prefix_cache=False)
    check("without steps ahead", prefix_cache=False, overlap_steps=False)
    assert check("with prefix reuse", max_batch_size=2)["prefix_tokens_hit"] > 0
    check("in small chunks", max_batch_size=16, max_tokens_per_step=32)
    check("in odd chunks", max_batch_size=16, max_tokens_per_step=77, prefix_cache=False)
    assert check("with preemption", num_pages=8, prefix_cache=False)["preemptions"] > 0
    assert check("with preemption and reuse", num_pages=8)["preemptions"] > 0


def test_weights_of_8_bits(model, llm):
    some = prompts(6, seed=2)
    quantized = LLM(model[0], precision="float32", quantize="int8", num_pages=64, batch_invariant=True)
    together = [o.choices[0].token_ids for o in quantized.generate(some, greedy(), progress=False)]
    alone = [quantized.generate(p, greedy(), progress=False)[0].choices[0].token_ids for p in some]
    assert together == alone
    exact = [o.choices[0].token_ids for o in llm.generate(some, greedy(), progress=False)]
    assert sum(a[0] == b[0] for a, b in zip(together, exact)) >= 3
    with pytest.raises(ValueError, match='quantize is "fp4", expected none, int8, fp8 or w4a8'):
        LLM(model[0], quantize="fp4")


def test_text_is_the_tokenizers(model, llm):
    _, _, tokenizer = model
    output = llm.generate("Grüße, 世界 🙂", greedy(100), progress=False)[0]
    ids = tokenizer.encode("Grüße, 世界 🙂").ids
    assert llm.tokenize("Grüße, 世界 🙂") == ids and output.prompt_tokens == len(ids)
    assert output.text == tokenizer.decode(output.choices[0].token_ids)
    assert llm.detokenize(output.choices[0].token_ids) == output.text


def test_continuations_and_seeds(llm):
    p = dict(max_tokens=20, ignore_eos=True, n=3, seed=7)
    a, b = llm.generate(["abc", "abc"], SamplingParams(**p), progress=False)
    assert [c.token_ids for c in a.choices] == [c.token_ids for c in b.choices]
    assert len({tuple(c.token_ids) for c in a.choices}) == 3
    assert a.completion_tokens == 60
    c = llm.generate("abc", SamplingParams(**{**p, "seed": 8}), progress=False)[0]
    assert c.choices[0].token_ids != a.choices[0].token_ids


def test_stop_string_and_stop_token(llm):
    free = llm.generate("stop", greedy(40, logprobs=0), progress=False)[0].choices[0]
    word = free.text[5:8]
    stopped = llm.generate("stop", greedy(40, stop=[word]), progress=False)[0].choices[0]
    assert stopped.text == free.text[: free.text.index(word)] and stopped.finish_reason == "stop"
    token = free.token_ids[6]
    stopped = llm.generate("stop", greedy(40, stop_token_ids=[token]), progress=False)[0].choices[0]
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]


def test_logprobs_are_the_models(model, llm):
    _, oracle, _ = model
    prompt = prompts(1, seed=5)[0]
    choice = llm.generate([prompt], greedy(4, logprobs=5), progress=False)[0].choices[0]
    tokens = list(prompt)
    for token, logprob in zip(choice.token_ids, choice.logprobs):
        expected = torch.log_softmax(torch.tensor(expected_logits(oracle, tokens)[-1]), -1)
        assert logprob["token"] == token and abs(logprob["logprob"] - expected[token].item()) < 1e-3
        assert list(logprob["top"])[0] == token and len(logprob["top"]) == 5
        for other, value in logprob["top"].items():
            assert abs(value - expected[other].item()) < 1e-3
        tokens.append(token)


@pytest.mark.parametrize(
    "prompt, params, part",
    [
        ("", {}, "prompt is empty"),
        ([1, 2, 999], {}, "prompt_token_ids[2] is 999, expected 0 to 263"),
        ([1] * 600, {}, "prompt has 600 tokens, expected at most 511"),
        ("a", {"top_p": 0}, "top_p is 0"),
        ("a", {"max_tokens": 0}, "max_tokens is 0"),
        ("a", {"stop": [""]}, "stop is"),
    ],
)
def test_errors_name_the_field(llm, prompt, params, part):
    with pytest.raises(ValueError) as error:
        llm.generate([prompt], SamplingParams(**params), progress=False)
    assert part in str(error.value)


def test_one_bad_prompt_of_many_is_named(llm):
    with pytest.raises(ValueError, match="request 1: prompt is empty"):
        llm.generate(["a", "", "b"], progress=False)


def test_chat_without_a_template_is_refused(llm):
    with pytest.raises(NotImplementedError, match="chat template"):
        llm.chat([{"role": "user", "content": "hello"}], progress=False)


def test_progress_bar_and_trace(llm, capfd):
    llm.generate(["a", "b"], greedy(5), progress=True)
    assert "2/2" in capfd.readouterr().err
    assert json.loads(llm.chrome_trace())["traceEvents"]
    assert llm.stats()["pages_used"] == 0


def test_an_exception_in_between_ends_the_requests(llm, monkeypatch):
    from flash_mla_kernels import llm as module

    class Impatient:
        def __init__(self, total):
            pass

        def show(self, done, tokens):
            if tokens > 3:
                raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(module, "_progress_bar", Impatient)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", greedy(400))
    assert llm.stats()["running"] == 0 and llm.stats()["pages_used"] == 0


def test_damaged_weights_are_refused(tmp_path):
    write_checkpoint("letters", tmp_path)
    write_tokenizer(tmp_path)

    def spoil(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    edit_weights(tmp_path, spoil)
    with pytest.raises(ValueError, match="model.norm.weight"):
        LLM(tmp_path, num_pages=8)
