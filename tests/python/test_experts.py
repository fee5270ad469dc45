"""How often experts are chosen: GET /experts, the metrics of it, and the way from there to a placement and a plan."""

import json
import re
import subprocess

import pytest
from live_server import PROGRAM, ROOT, Server

SMALL = ROOT / "models" / "small"
EXPERTS, CHOSEN, LAYERS = 8, 2, [1, 2, 3, 4]


def ask(server, prompt, max_tokens=24):
    body = {"model": "small", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return server.json("/v1/completions", body)["choices"][0]["text"]


def load(server):
    texts = [ask(server, prompt) for prompt in ("In the beginning", "And it came to pass in those days " * 8)]
    server.wait_until_idle()
    return texts


def program(*arguments):
    result = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def metrics(server, name):
    """Of a metric with one label: by the label's value."""
    text = server.call("/metrics")[1]
    return {key: float(value) for key, value in re.findall(rf'^{name}{{\w+="(.*)"}} (\S+)$', text, re.M)}


def mean_over_max(loads):
    return sum(loads) / len(loads) / max(loads)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A server that has answered, and the file of its choices."""
    server = Server(SMALL)
    load(server)
    file = tmp_path_factory.mktemp("experts") / "experts.json"
    file.write_text(server.call("/experts")[1])
    yield server, file
    assert server.stop() == 0


def test_the_histogram_has_every_choice(counted):
    server, file = counted
    answer = json.loads(file.read_text())
    layers = answer["layers"]
    assert [layer["layer"] for layer in layers] == LAYERS
    tokens = server.metric("mla_computed_tokens_total")
    for layer in layers:
        counts = layer["counts"]
        assert len(counts) == EXPERTS
        assert layer["choices"] == sum(counts) == sum(layer["rank_counts"])
        assert layer["balancedness"] == pytest.approx(mean_over_max(counts))
        assert layer["rank_balancedness"] == 1
        assert layer["hottest_share"] == pytest.approx(max(counts) / sum(counts))
        assert counts[layer["hottest_expert"]] == max(counts)
    # The last layer sees of a prompt its last token alone.
    assert [layer["choices"] for layer in layers[:-1]] == [CHOSEN * tokens] * 3
    assert answer["hottest_share"] == max(layer["hottest_share"] for layer in layers)
    mean = sum(sum(layer["counts"]) / EXPERTS for layer in layers)
    assert answer["balancedness"] == pytest.approx(mean / sum(max(layer["counts"]) for layer in layers))


def test_the_metrics_say_the_same(counted):
    server, file = counted
    answer = json.loads(file.read_text())
    by_layer = {str(layer["layer"]): layer for layer in answer["layers"]}
    assert metrics(server, "mla_expert_choices_total") == {name: layer["choices"] for name, layer in by_layer.items()}
    shares = metrics(server, "mla_expert_hottest_share")
    assert shares == {name: pytest.approx(layer["hottest_share"]) for name, layer in by_layer.items()}
    assert metrics(server, "mla_expert_balancedness") == {"experts": pytest.approx(answer["balancedness"]), "ranks": 1}
    assert metrics(server, "mla_rank_expert_choices_total") == {"0": sum(layer["choices"] for layer in answer["layers"])}


def test_the_file_makes_a_placement_for_ranks_and_a_plan(counted, tmp_path):
    server, file = counted
    placement = tmp_path / "placement.json"
    program("experts", "plan", "--histogram", file, "--gpus", 2, "--copies", 2, "-o", placement)
    planned = json.loads(placement.read_text())
    assert [load["counts"] for load in planned["loads"]] == [x["counts"] for x in json.loads(file.read_text())["layers"]]
    plan = program("plan", "--model", "deepseek-v3", "--experts", make_large(file, tmp_path), "--ep", 32, "--format", "json")
    even = program("plan", "--model", "deepseek-v3", "--ep", 32, "--format", "json")
    assert json.loads(plan) != json.loads(even)

    ranks = Server(SMALL, "--tp", "2", "--expert-placement", str(placement), "--batch-invariant", "--threads", "2")
    load(ranks)
    answer = ranks.json("/experts")
    assert metrics(ranks, "mla_rank_expert_choices_total") == {
        str(rank): sum(layer["rank_counts"][rank] for layer in answer["layers"]) for rank in range(2)
    }
    for layer in answer["layers"]:
        of = planned["layers"][str(layer["layer"])]
        # Each step's experts that both ranks have are shared out by its load.
        for rank, count in enumerate(layer["rank_counts"]):
            alone = sum(c for c, at in zip(layer["counts"], of, strict=True) if at == [rank])
            most = sum(c for c, at in zip(layer["counts"], of, strict=True) if rank in at)
            assert alone <= count <= most
        assert sum(layer["rank_counts"]) == layer["choices"]
        assert layer["rank_balancedness"] == pytest.approx(mean_over_max(layer["rank_counts"]))
    means = sum(sum(layer["rank_counts"]) / 2 for layer in answer["layers"])
    balance = means / sum(max(layer["rank_counts"]) for layer in answer["layers"])
    assert answer["rank_balancedness"] == pytest.approx(balance)
    assert metrics(ranks, "mla_expert_balancedness")["ranks"] == pytest.approx(balance)
    assert ranks.stop() == 0


def make_large(file, folder):
    """The histogram with as many experts as DeepSeek-V3 has: every one 32 times."""
    layers = json.loads(file.read_text())["layers"]
    for layer in layers:
        layer["counts"] = layer["counts"] * 32
    large = folder / "large.json"
    large.write_text(json.dumps({"layers": layers}))
    return large
