"""AsyncLLM: tokens in, tokens out, in an event loop."""

import asyncio
import contextlib
import time

import pytest
from live_server import ROOT

from flash_mla_kernels import LLM, SamplingParams
from flash_mla_kernels.async_llm import AsyncLLM, TransferOptions

SMALL = ROOT / "models" / "small"
# The last bits of a sequence's logits are the same whatever runs beside it.
COMMON = {"precision": "float32", "batch_invariant": True, "num_threads": 1, "num_pages": 64}
ENDLESS = SamplingParams(max_tokens=2000, temperature=0, ignore_eos=True)


def greedy(tokens=8):
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def prompt_of(llm, words):
    return llm.tokenize("And it came to pass in those days, that there went out a decree. " * 20)[:words]


@contextlib.contextmanager
def running(**options):
    llm = AsyncLLM(SMALL, **{**COMMON, **options})
    try:
        yield llm
    finally:
        llm.close()


@pytest.fixture(scope="module")
def alone():
    """The tokens that an LLM gives, by prompt."""
    llm = LLM(SMALL, **COMMON)
    return lambda prompt, tokens=8: llm.generate(list(prompt), greedy(tokens), progress=False)[0].choices[0].token_ids


async def tokens_of(llm, prompt, sampling=None, **kw):
    tokens, event = [], None
    async for event in llm.generate(prompt, sampling or greedy(), **kw):
        tokens += event["token_ids"]
    assert event["last"]
    return tokens, event


async def until(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)


def test_many_at_once_have_the_tokens_of_each_alone(alone):
    async def main():
        with running() as llm:
            prompts = [prompt_of(llm, n) for n in (3, 70, 150, 9, 200)]
            answers = await asyncio.gather(*(tokens_of(llm, p) for p in prompts))
            for prompt, (tokens, last) in zip(prompts, answers):
                assert tokens == alone(prompt)
                assert last["finish_reason"] == "length"
                assert (last["prompt_tokens"], last["completion_tokens"]) == (len(prompt), 8)
            await until(lambda: llm.load()["running"] == 0, "a sequence goes on")

    asyncio.run(main())


def test_continuations_and_log_probabilities():
    async def main():
        with running() as llm:
            sampling = SamplingParams(max_tokens=4, n=3, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
            counts = {0: 0, 1: 0, 2: 0}
            async for event in llm.generate(prompt_of(llm, 20), sampling):
                counts[event["index"]] += len(event["token_ids"])
                assert [one["token"] for one in event["logprobs"]] == event["token_ids"]
                assert all(len(one["top"]) == 2 for one in event["logprobs"])
            assert counts == {0: 4, 1: 4, 2: 4}

    asyncio.run(main())


def test_abort_ends_a_request_in_the_engine():
    async def main():
        with running() as llm:
            events = llm.generate(prompt_of(llm, 20), ENDLESS, "one")
            first = await events.__anext__()
            assert first["token_ids"] and not first["finish_reason"]
            with pytest.raises(ValueError, match="request_id is 'one'"):
                await llm.generate([1, 2], greedy(), "one").__anext__()
            llm.abort("one")
            llm.abort("nobody")
            rest = [event async for event in events]
            assert rest[-1]["finish_reason"] == "cancelled"
            await until(lambda: llm.load()["pages_used"] == 0, "it goes on")
            assert llm.stats()["cancelled"] == 1
            # The name is free again.
            assert len((await tokens_of(llm, [5, 6, 7], request_id="one"))[0]) == 8

    asyncio.run(main())


def test_an_abort_before_the_engine_has_it_counts():
    async def main():
        with running() as llm:
            task = asyncio.ensure_future(tokens_of(llm, [5, 6, 7], ENDLESS, request_id="early"))
            await asyncio.sleep(0)  # it has begun, and has not come to the engine
            llm.abort("early")
            assert (await task)[1]["finish_reason"] == "cancelled"

    asyncio.run(main())


def test_who_goes_away_ends_the_request():
    async def main():
        with running() as llm:
            events = llm.generate(prompt_of(llm, 20), ENDLESS)
            await events.__anext__()
            await events.aclose()
            await until(lambda: llm.stats()["cancelled"] == 1, "it goes on")
            task = asyncio.ensure_future(tokens_of(llm, prompt_of(llm, 30), ENDLESS))
            await until(lambda: llm.load()["running"] > 0, "nothing runs")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: llm.load()["running"] == 0, "it goes on")
            await until(lambda: llm.stats()["cancelled"] == 2, "not both are cancelled")

    asyncio.run(main())


def test_close_ends_what_runs():
    async def main():
        llm = AsyncLLM(SMALL, **COMMON)
        task = asyncio.ensure_future(tokens_of(llm, [5, 6, 7], ENDLESS))
        await until(lambda: llm.load()["running"] > 0, "nothing runs")
        llm.close()
        assert (await task)[1]["finish_reason"] == "cancelled"
        llm.close()

    asyncio.run(main())


def test_what_cannot_run_is_refused_and_named():
    async def main():
        with running() as llm:
            with pytest.raises(ValueError, match="prompt_token_ids\\[1\\] is -3"):
                await tokens_of(llm, [1, -3])
            with pytest.raises(ValueError, match="expected none: the server has no --role"):
                await tokens_of(llm, [1, 2], bootstrap=("127.0.0.1", 1, 2))
            with pytest.raises(ValueError, match="regex"):
                await tokens_of(llm, [1, 2], SamplingParams(regex="(", max_tokens=3))
            assert llm.load()["running"] == 0
        with pytest.raises(ValueError, match='role is "both"'):
            TransferOptions(role="both")
        with pytest.raises(ValueError, match="peers"):
            TransferOptions(role="decode", peers=["nowhere"])

    asyncio.run(main())


def test_cache_events_say_what_is_found_again():
    async def main():
        with running(cache_events=True, num_pages=12) as llm:
            cached, ends = set(), {}
            prompts = [prompt_of(llm, n) for n in (200, 150, 300)] + [[7] * 260, [9] * 300]
            found = 0
            for i in (0, 1, 2, 0, 3, 4, 0, 3, 2, 1):
                prompt = prompts[i]
                begins = [e for b, e in ends.items() if b in cached and len(e) < len(prompt) and prompt[: len(e)] == e]
                _, last = await tokens_of(llm, prompt)
                assert last["cached_tokens"] == max(map(len, begins), default=0)
                found += last["cached_tokens"]
                await until(lambda: llm.load()["running"] == 0, "it goes on")
                for event in llm.take_cache_events():
                    if event["type"] == "removed":
                        cached.remove(event["block"])
                        continue
                    assert len(event["token_ids"]) == 64
                    before = [] if event["parent"] is None else ends[event["parent"]]
                    ends[event["block"]] = before + event["token_ids"]
                    cached.add(event["block"])
                load = llm.load()
                assert load["pages_cached"] == len(cached)
                assert load["pages_total"] == 12
            assert found > 0
            assert load["prefix_tokens_hit"] == found

    asyncio.run(main())


def test_prefill_and_decode_apart_give_the_tokens_of_one(alone):
    prefill_side = TransferOptions(role="prefill", port=0, layerwise_tokens=200)
    decode_side = TransferOptions(role="decode", peers=["*"])

    async def main():
        with running(transfer=prefill_side) as prefill, running(transfer=decode_side) as decode:
            port = prefill.stats()["transfer"]["port"]
            for room, words in enumerate((5, 130, 300)):
                prompt = prompt_of(prefill, words)
                where = ("127.0.0.1", port, room)
                (first, _), (tokens, last) = await asyncio.gather(
                    tokens_of(prefill, prompt, bootstrap=where), tokens_of(decode, prompt, bootstrap=where)
                )
                assert tokens == alone(prompt)
                assert first == tokens[:1]
                assert last["cached_tokens"] == len(prompt) - 1
            for llm in (prefill, decode):
                await until(lambda llm=llm: llm.stats()["transfer"]["handed_over"] == 3, "not all are handed over")

    asyncio.run(main())
