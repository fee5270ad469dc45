import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla_kernels import planner


def test_plan_is_a_plain_dictionary():
    result = planner.plan(model="deepseek-v3", hardware="h200", ep=16, batch=64)
    assert result["fits"] and result["decode"]["bottleneck"] == "memory bandwidth"
    assert result["decode"]["plan"] == {"tp": 1, "ep": 16, "dp": 16, "pp": 1, "cp": 1}
    assert result["summary"]["tpot_s"] == result["decode"]["time_s"]["step"]


def test_settings_go_on_top_of_a_request():
    request = {"plan": {"ep": 8}, "workload": {"batch": 4}, "precision": {"moe": "w4a8"}}
    result = planner.plan(request, batch=32)
    assert result["workload"]["batch"] == 32 and result["decode"]["plan"]["ep"] == 8
    assert request["workload"]["batch"] == 4


def test_a_deployment_is_searched():
    found = planner.deployment(128, 50, model="DeepSeek-R1", hardware="H200", input=4096)
    assert found["best"]["cards"] == 24 and found["best"]["tokens_per_s_user"] >= 50
    lines = planner.render(found).splitlines()
    assert lines[0].startswith("128 users of deepseek-v3, 4096 tokens in")
    # What starts either side, or why nothing does.
    assert lines[1].startswith("  decode: ") and any(line.startswith("  prefill: flash-mla serve --model DIR --tp 8") for line in lines)
    assert planner.deployment(128, 1e5)["best"] is None


def test_explain_substitutes_numbers():
    steps = {s["name"]: s for s in planner.plan(ep=16, explain=True)["explain"] if s["phase"] == "decode"}
    assert eval(steps["F_attn"]["substituted"]) == steps["F_attn"]["value"]
    assert steps["F_attn"]["value"] == 61 * 32 * 3810 * 278528


def test_sweep_and_compare_agree_with_plan():
    sweep = planner.sweep({"ep": (16, 32), "batch": range(8, 33, 8)}, hardware="h200", tpot_ms=50)
    assert len(sweep["rows"]) == 8 and sweep["rows"][sweep["best"]]["meets_slo"]
    one = planner.plan(hardware="h200", ep=16, batch=8)
    assert sweep["rows"][0]["tpot_ms"] == pytest.approx(1e3 * one["summary"]["tpot_s"], rel=1e-12)
    both = planner.compare({"name": "a", "set": {"hardware": "h20", "ep": 32}}, {"name": "b", "set": {"hardware": "h200", "ep": 32}})
    assert both["rows"][both["best"]]["name"] == "b"


def test_calibrate_takes_measurements_and_gives_hardware():
    rows = [
        {"b": b, "s_q": 1, "h_q": h, "h_kv": 1, "s_k": s, "dtype": "bfloat16", "ms": 0.01 + b * h * s * 1e-7}
        for b in (1, 32)
        for h in (16, 128)
        for s in (1024, 8192)
    ]
    out = planner.calibrate({"machine": {}, "commit": "x", "command": "y", "rows": rows}, hardware="h200")
    assert len(out["rows"]) == 8
    assert planner.plan(hardware=out["profile"], ep=16)["hardware"]["name"] == "H200 SXM, measured"


def test_errors_are_value_errors_with_key_value_and_choice():
    with pytest.raises(ValueError, match=r"plan\.ep = 3: expected a divisor of the 256 routed experts"):
        planner.plan(ep=3)
    with pytest.raises(ValueError, match=r"unknown key speed"):
        planner.plan(speed=1)
    with pytest.raises(ValueError, match=r"workload\.batch = 0"):
        planner.plan(ep=16, batch=0)


def test_a_plan_that_does_not_fit_says_why():
    result = planner.plan(ep=1)
    assert not result["fits"] and "does not fit" in result["problem"]


def test_tables_and_catalog():
    verdicts = [cell["verdict"] for cell in planner.tables()["cells"]]
    assert verdicts.count("inputs unknown") == 10 and verdicts.count("match") > 80
    assert "deepseek-v3.2" in planner.catalog()["models"]


def test_render():
    result = planner.sweep({"ep": [16, 32]})
    rows = list(csv.DictReader(io.StringIO(planner.render(result, "csv"))))
    assert [row["ep"] for row in rows] == ["16", "32"]
    assert json.loads(planner.render(result, "json")) == result
    with pytest.raises(ValueError, match="table, csv, json"):
        planner.render(result, "xml")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-v3.2"]),
    st.sampled_from(["h20", "h800", "h200", "a100"]),
    st.integers(-2, 300),
    st.integers(-2, 300),
    st.integers(-2, 10**7),
    st.integers(-2, 200000),
)
def test_any_request_gives_numbers_or_an_explanation(model, hardware, tp, ep, batch, length):
    try:
        result = planner.plan(model=model, hardware=hardware, tp=tp, ep=ep, batch=batch, input=length)
    except ValueError as error:
        assert "expected" in str(error)
        return
    for phase in ("prefill", "decode"):
        assert all(0 <= x < float("inf") for x in result[phase]["time_s"].values())
    assert result["fits"] or result["problem"]
