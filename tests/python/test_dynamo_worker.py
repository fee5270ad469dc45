"""The Dynamo worker without Dynamo: what it makes of requests, events and figures, and itself over stand-ins for the
classes that it takes from there. tests/dynamo has it under the real one."""

import asyncio
import contextlib
import dataclasses
import enum
import importlib
import os
import subprocess
import sys
import types

import pytest
from live_server import ROOT, wait_for

from flash_mla_kernels import LLM, SamplingParams
from flash_mla_kernels.dynamo import arguments, chunks, publishing, requests

SMALL = ROOT / "models" / "small"
FLAGS = ("--model", str(SMALL), "--precision", "float32", "--batch-invariant", "--num-threads", "1", "--num-pages", "64")

# ------------------------------------------------------------------ requests, chunks, events


def sampling(request, defaults=None, max_length=100):
    return requests.sampling_of({"token_ids": [1] * 30, **request}, max_length, defaults or SamplingParams())


def test_a_request_is_the_engines_sampling():
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "n": 2, "frequency_penalty": 0.5}
    stop = {"max_tokens": 9, "min_tokens": 2, "stop": ["x"], "stop_token_ids_hidden": [5], "stop_token_ids": [4]}
    p = sampling({"sampling_options": options, "stop_conditions": stop, "output_options": {"logprobs": 3}})
    for name, value in options.items():
        assert getattr(p, name) == value
    assert (p.max_tokens, p.min_tokens, p.stop, p.stop_token_ids, p.logprobs) == (9, 2, ["x"], [4, 5], 3)


def test_what_a_request_leaves_open_is_the_models():
    p = sampling({"sampling_options": {"temperature": None, "top_k": -1}}, SamplingParams(temperature=0.3, top_p=0.8))
    assert (p.temperature, p.top_p, p.top_k, p.logprobs) == (0.3, 0.8, 0, -1)
    assert p.max_tokens == 70, "as long as it may be"
    assert sampling({}).ignore_eos is False


def test_ignore_eos_leaves_no_token_that_ends_a_text():
    p = sampling({"stop_conditions": {"ignore_eos": True, "stop_token_ids_hidden": [5]}})
    assert p.ignore_eos and p.stop_token_ids == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling_options": {"temperature": -1}}, "temperature is -1"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search is True"),
        ({"sampling_options": {"best_of": 3}}, "best_of is 3, expected at most n, 1"),
        ({"sampling_options": {"guided_decoding": {"structural_tag": {}}}}, "structural_tag"),
        ({"sampling_options": {"guided_decoding": {"regex": "a", "choice": ["b"]}}}, "more than one"),
        ({"output_options": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"stop_conditions": {"max_tokens": 0}}, "max_tokens is 0"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sampling(fields)


def test_a_format_takes_the_place_of_stop_strings():
    p = sampling({"sampling_options": {"guided_decoding": {"json": {"type": "object"}, "regex": None}}, "stop_conditions": {"stop": ["x"]}})
    assert p.stop == []


def test_a_room_is_the_routers_or_the_prefill_workers():
    info = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 2}
    assert requests.room_of({"bootstrap_info": info}) == ("h", 1, 2)
    assert requests.room_of({"prefill_result": {"disaggregated_params": info}}) == ("h", 1, 2)
    assert requests.room_of({}) is None
    assert requests.room_of({"bootstrap_info": None, "prefill_result": {"disaggregated_params": None}}) is None


def event(**fields):
    plain = {"token_ids": [4, 5], "index": 1, "logprobs": [], "finish_reason": "", "error": "", "last": False}
    return {**plain, "prompt_tokens": 10, "cached_tokens": 7, "completion_tokens": 2, **fields}


def test_an_event_is_a_chunk():
    assert chunks.chunk_of(event(), str) == {"token_ids": [4, 5], "index": 1}
    last = chunks.chunk_of(event(finish_reason="length"), str)
    assert last["finish_reason"] == "length"
    assert last["completion_usage"]["total_tokens"] == 12
    assert last["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
    one = {"token": 4, "logprob": -0.5, "rank": 1, "top": {4: -0.5, 9: -1.5}}
    told = chunks.chunk_of(event(token_ids=[4], logprobs=[one]), lambda ids: f"<{ids[0]}>")
    assert told["log_probs"] == [-0.5]
    assert told["top_logprobs"][0][1] == {"rank": 2, "token_id": 9, "token": "<9>", "logprob": -1.5}
    with pytest.raises(RuntimeError, match="it burns"):
        chunks.chunk_of(event(finish_reason="error", error="it burns"), str)


def test_cache_events_are_signed():
    stored = {"type": "stored", "block": 2**64 - 1, "parent": 2**63, "token_ids": [1, 2], "rank": 0}
    assert publishing.event_of(stored) == {
        "type": "stored",
        "token_ids": [1, 2],
        "num_block_tokens": [2],
        "block_hashes": [-1],
        "parent_hash": -(2**63),
    }
    assert publishing.event_of({"type": "removed", "block": 5, "rank": 0}) == {"type": "removed", "block_hashes": [5]}


class Recorder:
    """A publisher of Dynamo's."""

    def __init__(self):
        self.events, self.snapshots, self.fails = [], [], 0

    def publish_batch(self, events):
        if self.fails:
            self.fails -= 1
            raise RuntimeError("not now")
        self.events += events

    def publish(self, rank, snapshot):
        self.snapshots.append((rank, snapshot))


def test_publishing_goes_on_after_a_failure_and_ends_when_told():
    load = {"pages_used": 2, "pages_total": 8, "prefix_tokens_looked_up": 0, "prefix_tokens_hit": 0}
    pending = [[{"type": "removed", "block": 1, "rank": 0}], [{"type": "removed", "block": 2, "rank": 0}]]
    engine = types.SimpleNamespace(take_cache_events=lambda: pending.pop() if pending else [], rank_loads=lambda: [dict(load)])
    recorder = Recorder()
    recorder.fails = 1
    told = publishing.Publishing(engine, dict)
    told.publish_events(recorder)
    told.publish_snapshots(recorder)
    wait_for(lambda: recorder.events and recorder.snapshots, "nothing is published")
    assert recorder.snapshots[0] == (0, {"kv_used_blocks": 2, "kv_total_blocks": 8, "gpu_cache_usage": 0.25, "dp_rank": 0, "kv_cache_hit_rate": None})
    told.stop()
    count = len(recorder.snapshots)
    load["pages_used"] = 3
    told.publish_events(recorder)
    told.stop()
    assert len(recorder.snapshots) == count == 1, "published without a change, or after the end"


def test_each_rank_is_told_of_by_its_own_publisher():
    loads = [{"pages_used": rank, "pages_total": 8, "prefix_tokens_looked_up": 4, "prefix_tokens_hit": rank} for rank in range(2)]
    pending = [[{"type": "removed", "block": block, "rank": block % 2} for block in (1, 2, 3)]]
    engine = types.SimpleNamespace(take_cache_events=lambda: pending.pop() if pending else [], rank_loads=lambda: loads)
    recorders, snapshots = [Recorder(), Recorder()], Recorder()
    recorders[0].fails = 1  # which is nothing to the other
    told = publishing.Publishing(engine, dict)
    told.publish_snapshots(snapshots)
    told.publish_events(recorders[0], ranks=2, rank=0)
    wait_for(lambda: len(snapshots.snapshots) == 2, "no snapshots")
    assert pending, "events are taken before all ranks have a publisher"
    told.publish_events(recorders[1], ranks=2, rank=1)
    wait_for(lambda: recorders[1].events, "nothing is published")
    told.stop()
    assert [event["block_hashes"] for event in recorders[1].events] == [[1], [3]] and not recorders[0].events
    assert [(rank, s["dp_rank"], s["kv_cache_hit_rate"]) for rank, s in snapshots.snapshots] == [(0, 0, 0.0), (1, 1, 0.25)]


# ------------------------------------------------------------------ the command line


def test_the_command_line(monkeypatch):
    hosts = [f"DYN_{plane}_HOST" for plane in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "SYSTEM")]
    for name in hosts:
        monkeypatch.setenv(name, "")  # so that what is set here goes afterwards
        monkeypatch.delenv(name)
    options = arguments.parse(["--model", str(SMALL), "--disaggregation-mode", "prefill"])
    assert (options.served_model_name, options.component) == ("small", "prefill")
    assert arguments.parse(["--model", str(SMALL)]).component == "backend"
    assert [os.environ[name] for name in hosts] == ["127.0.0.1"] * 4
    assert options.bootstrap_host == "127.0.0.1"
    both = ["--disaggregation-mode", "decode", "--kv-tier", "ram:1GiB", "--dp", "2", "--host", "10.0.0.1"]
    monkeypatch.delenv(hosts[0])
    options = arguments.parse(["--model", str(SMALL), *both])
    assert (options.dp, options.kv_tier, options.bootstrap_host) == (2, ["ram:1GiB"], "10.0.0.1")
    assert [os.environ[name] for name in hosts] == ["10.0.0.1", *["127.0.0.1"] * 3], "what is set goes first"


def test_without_dynamo_it_says_what_to_install(tmp_path):
    for name in ("flash_mla", "flash_mla_kernels"):
        command = [sys.executable, "-m", f"{name}.dynamo", "--model", str(SMALL)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert "pip install ai-dynamo==1.6.1" in done.stderr


# ------------------------------------------------------------------ the worker


class Mode(enum.Enum):
    AGGREGATED, PREFILL, DECODE = "agg", "prefill", "decode"


class InvalidArgument(Exception):
    pass


def record(name):
    return type(name, (types.SimpleNamespace,), {})


class Registry:
    def __init__(self, auto_describe):
        self.collectors = []

    def register(self, collector):
        self.collectors.append(collector)

    def values(self):
        return {family.name: family.value for collector in self.collectors for family in collector.collect()}


class Family:
    def __init__(self, name, documentation, value=None, labels=None):
        self.name, self.value = name, value if labels is None else {}

    def add_metric(self, labels, value):
        self.value[labels[0]] = value


STANDINS = {
    "dynamo": {},
    "dynamo.common": {},
    "dynamo.common.backend": {
        "EngineConfig": record("EngineConfig"),
        "LLMEngine": object,
        "LlmRegistration": record("LlmRegistration"),
        "WorkerConfig": record("WorkerConfig"),
    },
    "dynamo.common.backend.dp_rank": {
        "forced_dp_rank": lambda request: (request.get("routing") or {}).get("dp_rank"),
        "validate_global_dp_rank": lambda rank, first, count, label: rank if count > 1 else None,
    },
    "dynamo.common.backend.health_check": {"build_health_check_payload": lambda bos_token_id: {"token_ids": [bos_token_id]}},
    "dynamo.common.backend.metrics": {"register_engine_registry": lambda metrics, registry: metrics.append(registry)},
    "dynamo.common.backend.publisher": {"ComponentSnapshot": dict, "PushSource": record("PushSource")},
    "dynamo.common.constants": {"DisaggregationMode": Mode},
    "dynamo.common.utils": {},
    "dynamo.common.utils.token_ids": {"normalize_request_token_ids": lambda request: request},
    "dynamo.llm": {},
    "dynamo.llm.exceptions": {"InvalidArgument": InvalidArgument},
    "prometheus_client": {"CollectorRegistry": Registry},
    "prometheus_client.core": {"CounterMetricFamily": Family, "GaugeMetricFamily": Family},
}


@pytest.fixture
def make_worker(monkeypatch):
    for name, members in STANDINS.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("worker", "metrics"):
        monkeypatch.delitem(sys.modules, f"flash_mla_kernels.dynamo.{name}", raising=False)
    module = importlib.import_module("flash_mla_kernels.dynamo.worker")
    yield lambda *flags: module.Worker.of(arguments.parse([*FLAGS, *flags]))
    for name in ("worker", "metrics"):
        sys.modules.pop(f"flash_mla_kernels.dynamo.{name}", None)


@dataclasses.dataclass
class Context:
    name: str = "one"

    def id(self):
        return self.name


@contextlib.asynccontextmanager
async def started(worker):
    config = await worker.start(1)
    try:
        yield config
    finally:
        await worker.cleanup()
        await worker.cleanup()


def request_of(prompt, tokens=8, **fields):
    stop = {"max_tokens": tokens, "ignore_eos": True}
    return {"token_ids": prompt, "stop_conditions": stop, "sampling_options": {"temperature": 0.0}, **fields}


async def answer_of(worker, request, name="one"):
    return [chunk async for chunk in worker.generate(request, Context(name))]


def tokens_in(answer):
    return [token for chunk in answer for token in chunk["token_ids"]]


@pytest.fixture(scope="module")
def alone():
    llm = LLM(SMALL, precision="float32", batch_invariant=True, num_threads=1, num_pages=64)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    return lambda prompt: llm.generate(list(prompt), params, progress=False)[0].choices[0].token_ids


PROMPT = [(7 * i) % 200 + 5 for i in range(150)]


def test_it_answers_and_tells_the_router(make_worker, alone):
    worker, config = make_worker()
    assert config.disaggregation_mode is Mode.AGGREGATED and config.served_model_name == "small"

    async def main():
        async with started(worker) as engine:
            assert engine.llm.kv_cache_block_size == 64 and engine.llm.total_kv_blocks == 64
            assert engine.llm.bootstrap_port is None
            recorder, registries = Recorder(), []
            (source,) = await worker.kv_event_sources()
            source.on_ready(recorder)
            assert worker.component_metrics_dp_ranks() == [0]
            worker.attach_snapshot_publisher(recorder)
            await worker.register_prometheus(registries)
            answer = await answer_of(worker, request_of(PROMPT))
            assert tokens_in(answer) == alone(PROMPT)
            assert answer[-1]["finish_reason"] == "length"
            assert all("finish_reason" not in chunk for chunk in answer[:-1])
            wait_for(lambda: len(recorder.events) >= 2, "no events")
            assert recorder.events[0]["token_ids"] == PROMPT[:64]
            assert recorder.events[0]["parent_hash"] is None
            assert recorder.events[1]["parent_hash"] == recorder.events[0]["block_hashes"][0]
            wait_for(lambda: recorder.snapshots and recorder.snapshots[-1][1]["kv_used_blocks"] == 0, "no snapshot")
            values = registries[0].values()
            assert values["mla_requests_submitted"] == 1 and values["mla_generated_tokens"] == 8
            assert values["mla_cache_pages"] == 64
            assert values["mla_continuations_finished"] == {"stop": 0, "length": 1, "cancelled": 0, "error": 0}
            with pytest.raises(InvalidArgument, match="temperature is -1"):
                await answer_of(worker, {"token_ids": [1], "sampling_options": {"temperature": -1.0}})
            with pytest.raises(InvalidArgument, match="prompt has 0 tokens|prompt"):
                await answer_of(worker, {"token_ids": []})
            assert len(await answer_of(worker, await worker.health_check_payload())) > 0

    asyncio.run(main())


def test_ranks_are_told_of_and_run_what_the_router_gives_them(make_worker, alone):
    worker, _ = make_worker("--dp", "2")

    async def main():
        async with started(worker) as engine:
            assert (engine.llm.data_parallel_size, engine.llm.total_kv_blocks) == (2, 64)
            recorders, snapshots = [Recorder(), Recorder()], Recorder()
            sources = await worker.kv_event_sources()
            assert [source.dp_rank for source in sources] == worker.component_metrics_dp_ranks() == [0, 1]
            for source, recorder in zip(sources, recorders):
                source.on_ready(recorder)
            worker.attach_snapshot_publisher(snapshots)
            for rank in (1, 1, 0):
                answer = await answer_of(worker, request_of(PROMPT, routing={"dp_rank": rank}))
                assert tokens_in(answer) == alone(PROMPT)
            for recorder in recorders:
                wait_for(lambda r=recorder: len(r.events) >= 2, "no events")
                assert [event["token_ids"] for event in recorder.events] == [PROMPT[:64], PROMPT[64:128]]
            assert {rank for rank, _ in snapshots.snapshots} == {0, 1}

    asyncio.run(main())


def test_abort_ends_a_request(make_worker):
    worker, _ = make_worker()

    async def main():
        async with started(worker):
            chunks_of = worker.generate(request_of(PROMPT, 1500), Context("long"))
            await chunks_of.__anext__()
            await worker.abort(Context("another"))
            await worker.abort(Context("long"))
            rest = [chunk async for chunk in chunks_of]
            assert rest[-1]["finish_reason"] == "cancelled"
            # Dynamo's worker breaks its loop instead, at times.
            gone = worker.generate(request_of(PROMPT, 1500), Context("gone"))
            await gone.__anext__()
            await gone.aclose()
            while worker._llm.load()["running"]:
                await asyncio.sleep(0.01)
            assert worker._llm.stats()["cancelled"] == 2

    asyncio.run(main())


@pytest.mark.parametrize("by", ["room", "answer"])
def test_roles_give_the_tokens_of_one(make_worker, alone, by):
    prefill, config = make_worker("--disaggregation-mode", "prefill")
    decode, _ = make_worker("--disaggregation-mode", "decode")
    assert config.disaggregation_mode is Mode.PREFILL and config.component == "prefill"

    async def main():
        async with started(prefill) as engine, started(decode) as other:
            assert other.llm.bootstrap_port is None
            assert await decode.kv_event_sources() == []
            host, port = engine.llm.bootstrap_host, engine.llm.bootstrap_port
            info = {"bootstrap_info": {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": 77}}
            asked = info if by == "room" else {}
            first = prefill.generate(request_of(PROMPT, **asked), Context())
            told = (await first.__anext__())["disaggregated_params"]
            assert (told["bootstrap_host"], told["bootstrap_port"]) == (host, port)
            if by == "answer":
                asked = {"prefill_result": {"disaggregated_params": told}}

            async def rest():
                return [chunk async for chunk in first]

            prefilled, answer = await asyncio.gather(rest(), answer_of(decode, request_of(PROMPT, **asked)))
            assert tokens_in(answer) == alone(PROMPT)
            assert answer[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) - 1
            assert tokens_in(prefilled) == alone(PROMPT)[:1]
            while not await prefill.is_quiescent():
                await asyncio.sleep(0.01)
            # Without a prefill worker it computes by itself.
            assert tokens_in(await answer_of(decode, request_of(PROMPT))) == alone(PROMPT)

    asyncio.run(main())
