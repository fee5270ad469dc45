"""Pages at LMCache's server: what one engine has computed another loads, to the bit, and nothing that goes wrong there is
ever more than a miss."""

import importlib
import json
import mmap
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
from services import ROOT, SMALL, Engine, LmCache, Redis, wait_for

CHUNK = 256
HAS_REDIS = shutil.which("redis-server") is not None
needs_redis = pytest.mark.skipif(not HAS_REDIS, reason="no redis-server")


def prompt(seed, length=3 * CHUNK + 40):
    numbers = random.Random(seed)
    return [numbers.randrange(3, 4096) for _ in range(length)]


@pytest.fixture(scope="module")
def alone():
    """An engine without a tier: what is right."""
    engine = Engine(None, "--no-prefix-cache")
    yield engine
    assert engine.stop() == 0


@pytest.fixture(scope="module")
def lmcache():
    server = LmCache().start()
    yield server
    server.stop()


def test_what_one_engine_computes_another_loads_to_the_bit(lmcache, alone):
    tokens = prompt(1)
    expected, _ = alone.ask(tokens)
    first, second = Engine(lmcache), Engine(lmcache)
    assert first.ask(tokens) == (expected, 0)
    first.wait_until_stored(3 * CHUNK)
    assert second.ask(tokens) == (expected, 3 * CHUNK)
    assert second.tier("tokens_loaded") == 3 * CHUNK
    # A prompt that begins alike has as much of it.
    other = tokens[: 2 * CHUNK] + prompt(2, 100)
    assert second.ask(other)[0] == alone.ask(other)[0]
    for engine in (first, second):
        assert engine.tier("failures") == 0
        assert engine.stop() == 0
    # A third engine, when both have gone.
    third = Engine(lmcache)
    assert third.ask(tokens) == (expected, 3 * CHUNK)
    assert third.stop() == 0


def test_models_and_formats_never_share(lmcache):
    tokens = prompt(3)
    first = Engine(lmcache)
    first.ask(tokens)
    first.wait_until_stored(3 * CHUNK)
    others = [
        Engine(lmcache, model=ROOT / "models" / "small-sparse"),
        Engine(lmcache, "--quantize", "int8"),
        Engine(lmcache, "--kv-cache", "fp8"),
        Engine(lmcache, "--batch-invariant"),
    ]
    for other in others:
        _, cached = other.ask(tokens)
        assert cached == 0 == other.tier("tokens_found")
        other.wait_until_stored(3 * CHUNK)
        assert other.stop() == 0
    # Under its own name each is there.
    again = Engine(lmcache, "--kv-cache", "fp8")
    assert again.ask(tokens)[1] == 3 * CHUNK
    for engine in (first, again):
        assert engine.stop() == 0


def flip(memory):
    """A bit of every 512 bytes."""
    for at in range(0, len(memory), 512):
        memory[at] ^= 0x40


def test_changed_bytes_never_reach_a_text(lmcache, alone):
    tokens = prompt(4)
    expected, _ = alone.ask(tokens)
    first = Engine(lmcache)
    first.ask(tokens)
    first.wait_until_stored(3 * CHUNK)
    with open(lmcache.pool(), "r+b") as file, mmap.mmap(file.fileno(), 0) as pool:
        flip(pool)
    second = Engine(lmcache)
    assert second.ask(tokens) == (expected, 0)
    assert second.tier("failures") >= 1 and second.tier("tokens_loaded") == 0
    for engine in (first, second):
        assert engine.stop() == 0
    # What has been changed is there still, and good chunks are not kept in its place: change it back.
    with open(lmcache.pool(), "r+b") as file, mmap.mmap(file.fileno(), 0) as pool:
        flip(pool)
    third = Engine(lmcache)
    assert third.ask(tokens) == (expected, 3 * CHUNK)
    assert third.stop() == 0


@needs_redis
def test_restarts_of_engine_server_and_redis(alone):
    redis = Redis().start()
    lmcache = LmCache(redis).start()
    tokens = prompt(5)
    expected, _ = alone.ask(tokens)
    stays = Engine(lmcache, "--no-prefix-cache")
    assert stays.ask(tokens) == (expected, 0)
    stays.wait_until_stored(3 * CHUNK)
    wait_for(lambda: redis.client().dbsize() >= 3, "the chunks do not come to Redis")

    engine = Engine(lmcache)
    assert engine.ask(tokens) == (expected, 3 * CHUNK)
    assert engine.stop() == 0

    lmcache.kill()
    missed, cached = stays.ask(tokens)
    assert (missed, cached) == (expected, 0) and stays.tier("failures") > 0
    lmcache.start()

    def loads():
        answer, cached = stays.ask(tokens)
        assert answer == expected
        return cached == 3 * CHUNK

    # Its memory is empty: the chunks come from Redis, once the engine has found it again.
    wait_for(loads, "the engine does not come back to the server")

    lmcache.kill()
    redis.kill()
    redis.start()
    lmcache.start()
    wait_for(loads, "the chunks are lost with Redis")

    # Without Redis what the server has not in its memory is a miss.
    lmcache.kill()
    redis.kill()
    lmcache.launch()
    for seed in range(20, 23):
        other = prompt(seed)
        assert stays.ask(other)[0] == alone.ask(other)[0]
    assert stays.stop() == 0
    lmcache.kill()


@needs_redis
def test_changed_bytes_at_redis_never_reach_a_text(alone):
    redis = Redis().start()
    lmcache = LmCache(redis).start()
    tokens = prompt(6)
    expected, _ = alone.ask(tokens)
    first = Engine(lmcache)
    first.ask(tokens)
    first.wait_until_stored(3 * CHUNK)
    client = redis.client()
    wait_for(lambda: client.dbsize() >= 3, "the chunks do not come to Redis")
    lmcache.kill()
    changed = 0
    for key in client.keys():
        value = bytearray(client.get(key))
        if len(value) < 100000:
            continue
        flip(value)
        client.set(key, bytes(value))
        changed += 1
    assert changed >= 3
    lmcache.start()
    second = Engine(lmcache)
    assert second.ask(tokens) == (expected, 0)
    assert second.tier("failures") >= 1
    for engine in (first, second):
        assert engine.stop() == 0
    lmcache.stop()
    redis.kill()


def test_a_server_that_is_killed_in_the_middle():
    """While chunks are stored and loaded, at random moments: every answer is right, and the engine goes on."""
    lmcache = LmCache().start()
    # Several at a time: only in this mode are the bits the same whatever else is in the batch.
    reference = Engine(None, "--batch-invariant")
    engine = Engine(lmcache, "--no-prefix-cache", "--batch-invariant", wait=5)
    prompts = [prompt(seed, 6 * CHUNK + 10) for seed in range(30, 36)]
    expected = [reference.ask(tokens)[0] for tokens in prompts]
    assert reference.stop() == 0
    stop = threading.Event()
    wrong, asked = [], [0]

    def client(first):
        numbers = random.Random(first)
        while not stop.is_set():
            i = numbers.randrange(len(prompts))
            if engine.ask(prompts[i])[0] != expected[i]:
                wrong.append(i)
            asked[0] += 1

    threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    numbers = random.Random(7)
    loaded = []
    for kill in range(6):
        # Alternately while it stores what a new server has not, and while it loads.
        wait_until_more(lambda what=("tokens_loaded" if kill % 2 else "tokens_stored"): engine.tier(what), 1, "nothing moves")
        time.sleep(numbers.random() * 0.2)
        lmcache.kill()
        loaded.append(engine.tier("tokens_loaded"))
        wait_until_more(lambda: asked[0], 3, "the engine hangs without the server")
        lmcache.start()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert loaded[-1] > 0 and engine.tier("failures") > 0
    engine.wait_until_idle()
    assert engine.stop() == 0
    lmcache.kill()
    print(f"{asked[0]} answers over six deaths of the server, {int(loaded[-1])} tokens loaded in between")


def wait_until_more(count, more, what):
    """Until count() has grown by so many."""
    before = count()
    wait_for(lambda: count() >= before + more, what)


def test_200_prompts_under_eviction(alone):
    """More chunks than the server has room for, in an engine whose cache holds few pages: every answer is the right one."""
    lmcache = LmCache(None, 0.06, "--eviction-trigger-watermark", "0.7", "--eviction-ratio", "0.3").start()
    engine = Engine(lmcache, num_pages=24)
    numbers = random.Random(11)
    stems = [prompt(seed, 2 * CHUNK + 100) for seed in range(100, 130)]
    for _ in range(200):
        stem = numbers.choice(stems)
        tokens = stem[: numbers.randrange(40, len(stem))] + prompt(numbers.random(), numbers.randrange(1, 60))
        assert engine.ask(tokens, max_tokens=4)[0] == alone.ask(tokens, max_tokens=4)[0]
    engine.settled()
    loaded, stored = engine.tier("tokens_loaded"), engine.tier("tokens_stored")
    print(f"200 prompts: {int(loaded)} tokens loaded, {int(stored)} stored, {int(engine.tier('failures'))} failures")
    assert loaded > 0 and stored > 0
    engine.wait_until_idle()
    assert engine.stop() == 0
    lmcache.stop()


def test_an_8k_prompt_is_loaded_faster_than_computed(lmcache, tmp_path):
    """Not a test of speed: what is loaded is what is computed, and how long both take is said."""
    config = json.loads((SMALL / "config.json").read_text())
    config.update(max_position_embeddings=16384, num_hidden_layers=8, vocab_size=4096)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = tmp_path / "model"
    subprocess.run([sys.executable, ROOT / "bench" / "dummy_model.py", model, "--config", tmp_path / "config.json"], check=True)
    tokens = prompt(8, 8192 + 17)
    seconds = []

    def timed(engine):
        begin = time.monotonic()
        answer = engine.ask(tokens, max_tokens=1)
        seconds.append(time.monotonic() - begin)
        return answer

    first = Engine(lmcache, "--load-format", "dummy", model=model, num_pages=200)
    expected, cached = timed(first)
    assert cached == 0
    first.wait_until_stored(8192)
    size = first.tier("stored_bytes")
    assert first.stop() == 0
    second = Engine(lmcache, "--load-format", "dummy", model=model, num_pages=200)
    assert timed(second) == (expected, 8192)
    load_seconds = second.tier("load_seconds")
    assert second.stop() == 0
    print(f"8,192 tokens, {size / 1e6:.0f} MB: computed in {seconds[0]:.2f} s, from the tier {seconds[1]:.3f} s, "
          f"of which in its reads {load_seconds:.3f} s")  # fmt: skip


def test_shared_chunks_are_rows_as_vllm_has_them(lmcache):
    """--kv-shared: two engines under a public name, and what lies in the pool is (layers, 256, 576) of bfloat16: latents that
    in the first layer depend on the token alone, then pairs that the position turns."""
    import numpy

    token = 77
    tokens = prompt(9)
    tokens[10] = tokens[200] = token
    name = "test/small-shared"
    first = Engine(lmcache, "--kv-shared", name, precision="bf16")
    expected = first.ask(tokens)
    assert expected[1] == 0
    first.wait_until_stored(3 * CHUNK)
    second = Engine(lmcache, "--kv-shared", name, precision="bf16")
    assert second.ask(tokens) == (expected[0], 3 * CHUNK)
    own = Engine(lmcache, precision="bf16")
    assert own.ask(tokens)[1] == 0, "others' chunks come into the engine's own name"
    for engine in (first, second, own):
        assert engine.stop() == 0
    chunk = read_chunk(lmcache, name, tokens[:CHUNK], layers=5)
    words = numpy.frombuffer(chunk, dtype=numpy.uint16).astype(numpy.uint32) << 16
    rows = words.view(numpy.float32).reshape(5, CHUNK, 576)
    assert numpy.isfinite(rows).all() and (numpy.abs(rows).sum(axis=2) > 0).all()
    a, b = rows[0, 10], rows[0, 200]
    assert numpy.array_equal(a[:512], b[:512]), "latents come first"
    assert not numpy.array_equal(a[512:], b[512:])
    lengths = [numpy.hypot(row[512::2], row[513::2]) for row in (a, b)]
    assert numpy.allclose(*lengths, rtol=0.02, atol=0.01), "pairs lie side by side"
    assert not numpy.array_equal(rows[1, 10, :512], rows[1, 200, :512])


def read_chunk(lmcache, model, tokens, layers):
    """The first chunk, as LMCache's own messages give it to an engine."""
    import grpc
    import msgspec

    messages = "lmcache.v1.multiprocess.transport.grpc_impl._proto_gen."
    common_pb2, transfers, transfers_grpc, lookups, lookups_grpc = (
        importlib.import_module(messages + name)
        for name in ("common_pb2", "engine_driven_service_pb2", "engine_driven_service_pb2_grpc", "lookup_service_pb2",
                     "lookup_service_pb2_grpc")
    )  # fmt: skip
    channel = grpc.insecure_channel(f"127.0.0.1:{lmcache.port}")
    transfer, lookup = transfers_grpc.EngineDrivenServiceStub(channel), lookups_grpc.LookupServiceStub(channel)
    registered = transfer.RegisterKvCacheEngineDrivenContext(
        transfers.RegisterKvCacheEngineDrivenContextRequest(
            instance_id=4711, model_name=model, world_size=1, block_size=64, num_layers=layers, hidden_dim_size=576,
            dtype_str="bfloat16", use_mla=True))  # fmt: skip
    key = {"model_name": model, "world_size": 1, "token_ids": tokens, "start": 0, "end": CHUNK, "request_id": "test"}
    key = {**key, "num_kv_readers": 1}
    lookup.Lookup(lookups.LookupRequest(key=common_pb2.IpcCacheServerKey(**key), tp_size=1))
    found = lookup.WaitPrefetchStatus(lookups.WaitPrefetchStatusRequest(request_id="test", timeout=30))
    assert found.chunk_count == 1
    moving = common_pb2.IpcCacheServerKey(**key, worker_id=0)
    prepared = transfer.PrepareRetrieve(transfers.PrepareRetrieveRequest(key=moving, instance_id=4711))
    assert prepared.success
    (slot,) = msgspec.msgpack.decode(prepared.encoded_context)["slots"]
    assert slot["shape"] == [layers, CHUNK, 576] and slot["dtype"] == "bfloat16"
    with open(pathlib.Path("/dev/shm") / registered.shm_name.lstrip("/"), "rb") as pool:
        pool.seek(slot["offset"])
        chunk = pool.read(slot["length"])
    transfer.CommitRetrieve(transfers.CommitRetrieveRequest(key=moving, instance_id=4711))
    lookup.EndSession(lookups.EndSessionRequest(request_id="test"))
    return chunk


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--kv-shared", "x", "--batch-invariant"), "kv_shared is set with batch_invariant"),
        (("--kv-shared", "x", "--precision", "fp32"), "the pages of this model are not vLLM's"),
    ],
)
def test_what_cannot_be_shared_is_refused(flags, message):
    from live_server import PROGRAM

    command = [PROGRAM, "serve", "--model", SMALL, "--device", "cpu", "--port", "0", "--kv-tier", "lmcache://127.0.0.1:1", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0 and message in result.stderr, result.stderr


def test_a_server_that_was_never_there_costs_a_miss(alone):
    from services import free_port

    class Nowhere:
        port = free_port()

    engine = Engine(Nowhere)
    tokens = prompt(10)
    assert engine.ask(tokens) == (alone.ask(tokens)[0], 0)
    engine.settled()
    assert engine.tier("failures") > 0
    assert engine.stop() == 0
