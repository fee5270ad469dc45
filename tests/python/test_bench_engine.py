"""`flash-mla bench-engine` on the CPU, with the sizes of the small model and random weights."""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("FLASH_MLA_PROGRAM", str(ROOT / "build/release/src/cli/flash-mla"))


def test_simulated_acceptance_gives_the_tokens_that_the_planner_expects(tmp_path):
    drafts, acceptance, batch = 2, 0.7, 4
    out = tmp_path / "bench.json"
    flags = ["--config", str(ROOT / "models/small"), "--device", "cpu", "--batch", str(batch), "--context", "64"]
    flags += ["--prefill", "64", "--steps", "2", "--generate", "160", "--json", str(out)]
    flags += ["--draft-tokens", str(drafts), "--acceptance", str(acceptance)]
    subprocess.run([PROGRAM, "bench-engine", *flags], check=True, capture_output=True, timeout=600)
    figures = json.loads(out.read_text())
    off, mtp, auto = (
        next(row for row in figures["speculation"] if row["speculative"] == mode) for mode in ("off", "mtp", "auto")
    )
    assert off["drafted"] == 0 and off["tokens_per_step"] == 1
    # As in docs/planner.md: the first token for certain, a draft while all before it were accepted.
    expected = 1 + acceptance + acceptance**2
    assert mtp["expected_tokens_per_step"] == pytest.approx(expected)
    assert mtp["tokens_per_step_with_drafts"] == pytest.approx(expected, rel=0.1)
    assert mtp["accepted"] / mtp["drafted"] == pytest.approx((expected - 1) / drafts, rel=0.1)
    assert auto["tokens_per_step"] >= 1
    check = next(row for row in figures["verification"] if row["draft_tokens"] == drafts)
    assert check["batch"] == batch and check["step_seconds"] > 0 and check["module_seconds"] > 0
