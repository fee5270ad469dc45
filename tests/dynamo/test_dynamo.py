"""The worker under Dynamo 1.6.1: frontend and workers as processes, discovery through a folder, no etcd and no NATS."""

import concurrent.futures
import contextlib
import re
import signal
import time

import openai
import pytest
from services import Frontend, Worker, get, wait_for

WORDS = "And it came to pass in those days, that there went out a decree from Caesar. "


def client_of(frontend):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{frontend.port}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client, prompt, tokens=8, **fields):
    return client.completions.create(model="small", prompt=prompt, max_tokens=tokens, **{"temperature": 0, **fields})


def cached(answer):
    details = answer.usage.prompt_tokens_details
    return details.cached_tokens if details is not None and details.cached_tokens else 0


@contextlib.contextmanager
def cluster(folder, workers, *flags, name):
    """`workers`: names and flags of each."""
    frontend = Frontend(folder, *flags, name=f"{name}-frontend")
    started = [Worker(f"{name}-{i}", folder, *of) for i, of in enumerate(workers)]
    try:
        for process in (*started, frontend):
            process.wait_until_up()
        yield frontend, started
    finally:
        for process in (*started, frontend):
            process.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("two"), [(), ()], name="two") as (frontend, workers):
        # The frontend hears of workers one by one.
        client = client_of(frontend)

        def both_are_known():
            ask(client, f"{time.monotonic()} {WORDS * 2}", tokens=1)
            return all(worker.requests() > 0 for worker in workers)

        wait_for(both_are_known, "one of two workers never gets a request")
        yield client, workers


def test_a_worker_listens_on_loopback(two):
    # But for the sockets of events: Dynamo 1.6.1 binds those to all addresses, whatever it is told to advertise.
    _, workers = two
    for worker in workers:
        addresses = [address for address, _ in worker.listens_at()]
        assert ("127.0.0.1", worker.port) in worker.listens_at()
        assert addresses.count("127.0.0.1") >= 2, "requests and metrics"
        assert set(addresses) == {"127.0.0.1", "0.0.0.0"} and addresses.count("0.0.0.0") <= 3, worker.listens_at()


def test_ranks_with_caches_of_their_own_are_routed_to_one_by_one(tmp_path):
    with cluster(tmp_path, [("--dp", "2", "--num-threads", "2")], name="ranks") as (frontend, (worker,)):
        client = client_of(frontend)
        prefixes = [f"{group} {WORDS * 12}" for group in range(6)]
        with concurrent.futures.ThreadPoolExecutor(len(prefixes)) as threads:
            list(threads.map(lambda prefix: ask(client, f"{prefix} first", tokens=40), prefixes))
        for group, prefix in enumerate(prefixes):
            for question in range(2):
                time.sleep(0.3)  # blocks reach the router a moment after the answer
                assert cached(ask(client, f"{prefix} and {question}", tokens=2)) >= 64, f"group {group}, question {question}"
        # Both ranks are told of: by the router's own figures of the worker.
        text = get(worker.port, "/metrics")[1]
        ranks = set(re.findall(r'dynamo_component_total_blocks{[^}]*dp_rank="(\d+)"', text))
        assert ranks == {"0", "1"}, [line for line in text.splitlines() if "total_blocks" in line]
        worker.wait_until_idle()


def test_the_openai_client_works(two):
    client, _ = two
    assert [model.id for model in client.models.list()] == ["small"]
    answer = ask(client, "In the beginning", tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert len(answer.choices[0].text) > 10
    parts, last = [], None
    for chunk in ask(client, "In the beginning", tokens=12, stream=True, stream_options={"include_usage": True}):
        parts += [choice.text for choice in chunk.choices]
        last = chunk
    assert "".join(parts) == answer.choices[0].text
    assert len(parts) > 4, "it does not come piece by piece"
    assert last.usage.completion_tokens == 12


def test_stop_strings_log_probabilities_and_what_is_refused(two):
    client, _ = two
    text = ask(client, "In the beginning", tokens=20).choices[0].text
    word = text.split()[2]
    stopped = ask(client, "In the beginning", tokens=20, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(word)]
    told = ask(client, "In the beginning", tokens=4, logprobs=2).choices[0].logprobs
    assert len(told.token_logprobs) == 4 and all(value <= 0 for value in told.token_logprobs)
    with pytest.raises(openai.BadRequestError):
        ask(client, "In the beginning", temperature=-3.0)


def test_a_shared_prefix_goes_to_the_worker_that_holds_it(two):
    client, workers = two
    prefixes = [f"{group} {WORDS * 12}" for group in range(6)]
    # At once, so that both workers get some.
    with concurrent.futures.ThreadPoolExecutor(len(prefixes)) as threads:
        list(threads.map(lambda prefix: ask(client, f"{prefix} first", tokens=40), prefixes))
    went = []
    for group, prefix in enumerate(prefixes):
        holder = None
        for question in range(4):
            before = [worker.requests() for worker in workers]
            # Blocks reach the router a moment after the answer.
            time.sleep(0.3)
            answer = ask(client, f"{prefix} and {question}", tokens=2)
            (at,) = [i for i, worker in enumerate(workers) if worker.requests() > before[i]]
            assert cached(answer) >= 64, f"group {group}, question {question} went to worker {at}"
            assert holder in (None, at)
            holder = at
        went.append(holder)
    print(f"\nprefixes by worker: {went}")
    assert set(went) == {0, 1}, "all lie at one worker: it need not have been looked for"


def test_a_client_that_leaves_ends_its_request_in_the_engine(two):
    client, workers = two

    def cancelled():
        return sum(worker.metric("mla_continuations_finished_total", reason="cancelled") for worker in workers)

    before = cancelled()
    stream = ask(client, f"{time.monotonic()} {WORDS}", tokens=1900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    wait_for(lambda: sum(worker.metric("mla_sequences_running") for worker in workers) == 1, "nothing runs")
    stream.close()
    wait_for(lambda: cancelled() == before + 1, "the request goes on")
    for worker in workers:
        worker.wait_until_idle()


def test_sigkill_of_a_worker_loses_no_later_request(tmp_path):
    with cluster(tmp_path, [(), ()], "--migration-limit", "3", name="killed") as (frontend, workers):
        client = client_of(frontend)
        expected = {}
        for i in range(8):
            prompt = f"{i} {WORDS * 6}"
            expected[prompt] = ask(client, prompt, tokens=6).choices[0].text
        wait_for(
            lambda: ask(client, f"{time.monotonic()} {WORDS}", tokens=1) and all(w.requests() > 0 for w in workers),
            "one of two workers never gets a request",
        )
        # One that runs, too: it goes on at the other worker.
        stream = ask(client, f"running {WORDS * 3}", tokens=150, stream=True, extra_body={"ignore_eos": True})
        parts = [next(iter(stream)).choices[0].text]
        wait_for(lambda: any(worker.metric("mla_sequences_running") for worker in workers), "nothing runs")
        (at,) = [i for i, worker in enumerate(workers) if worker.metric("mla_sequences_running")]
        workers[at].kill()
        for prompt, text in expected.items():
            assert ask(client, prompt, tokens=6).choices[0].text == text
        parts += [choice.text for chunk in stream for choice in chunk.choices]
        whole = ask(client, f"running {WORDS * 3}", tokens=150, extra_body={"ignore_eos": True}).choices[0].text
        assert "".join(parts) == whole
        assert workers[1 - at].requests() >= 8


def test_prefill_and_decode_apart_give_the_tokens_of_one(two, tmp_path):
    alone, _ = two
    roles = [("--disaggregation-mode", role) for role in ("decode", "prefill", "prefill")]
    with cluster(tmp_path, roles, "--migration-limit", "3", name="apart") as (frontend, workers):
        client = client_of(frontend)

        def handed_over():
            return [worker.metric("mla_transfer_handed_over_total") for worker in workers]

        # The frontend hears of the prefill workers some time after the decode worker.
        wait_for(
            lambda: ask(client, f"{time.monotonic()} {WORDS}", tokens=1) and min(handed_over()) > 0,
            "one of the prefill workers never hands over anything",
        )
        before = handed_over()
        prompts = [f"{i} {WORDS * (1 + 3 * i)}" for i in range(6)]
        for prompt in prompts:
            assert ask(client, prompt, tokens=10).choices[0].text == ask(alone, prompt, tokens=10).choices[0].text

        def new():
            received, *sent = (n - b for n, b in zip(handed_over(), before))
            return received, sum(sent)

        wait_for(lambda: new() == (6, 6), "not all are handed over")
        assert workers[0].metric("mla_transfer_fallbacks_total") == 0
        for worker in workers:
            worker.wait_until_idle()
            assert worker.metric("mla_transfer_rooms_open") == 0
        # One prefill worker less loses nothing.
        workers[1].kill()
        for prompt in prompts:
            assert ask(client, f"Then {prompt}").choices[0].text == ask(alone, f"Then {prompt}").choices[0].text
        assert new()[0] == 12


def test_sigterm_ends_a_worker_well(tmp_path):
    with cluster(tmp_path, [()], name="told") as (_, (worker,)):
        assert worker.kill(signal.SIGTERM) == 0
