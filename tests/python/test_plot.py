import json
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from flash_mla_kernels import planner, plot  # noqa: E402

PNG = b"\x89PNG"


def bench_result(threads=(2, 1)):
    """What `flash-mla bench` writes, as far as a picture shows it."""
    limits = [{"threads": t, "read_gbps": 10.0 * t, "fp32_gflops": 50.0 * t, "bf16_gflops": 200.0 * t} for t in threads]
    row = {"dtype": "bfloat16", "intensity": 120.0, "gflops": 90.0, "limit_fraction": 0.45, "sgemm_gflops": 40.0}
    rows = [{**row, "name": f"shape {t}", "threads": t} for t in threads]
    machine = {"cpu": "a CPU", "isa": "AVX-512 BF16"}
    return {"machine": machine, "commit": "0" * 40, "command": "flash-mla bench", "limits": limits, "rows": rows}


def test_planner_pictures(tmp_path):
    made = plot.draw(planner.plan(ep=16), tmp_path / "plan")
    made += plot.draw(planner.sweep({"ep": [16, 32], "batch": [8, 16]}, tpot_ms=50), tmp_path / "sweep")
    made += plot.draw(planner.compare({"set": {"ep": 16}}, {"set": {"ep": 32}}), tmp_path / "compare")
    assert [path.name for path in made] == ["roofline.png", "times.png", "sweep.png", "times.png"]
    assert all(path.read_bytes()[:4] == PNG for path in made)
    with pytest.raises(ValueError, match="no picture"):
        plot.draw(planner.tables(), tmp_path)


def inside(figure):
    """Fails where a label lies outside its picture, or a legend over what it explains."""
    from matplotlib.legend import Legend

    figure.canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02, "a label is cut off"
    for legend in figure.findobj(Legend):
        assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes), "a legend hides its picture"


def test_labels_fit_their_plots(tmp_path, monkeypatch):
    drawn = []
    save = plot._save

    def checked(pyplot, figure, path):
        figure.tight_layout()
        inside(figure)
        drawn.append(path)
        return save(pyplot, figure, path)

    monkeypatch.setattr(plot, "_save", checked)
    long = "hardware=h20 ep=16 moe=w4a8 kv=fp8_656 attention=bf16 batch=64 input=4096 output=1100"
    cases = [{"name": f"{long} {i}", "set": {"ep": 16, "moe": "w4a8"}} for i in range(6)]
    plot.draw(planner.plan(model="deepseek-v3.2", hardware="h200", ep=32, input=60000), tmp_path)
    plot.draw(planner.compare(*cases), tmp_path)
    plot.draw(planner.compare(cases[0]), tmp_path)
    axes = {"ep": [16, 32, 64, 128, 256], "tp": [1, 2, 4], "batch": [8, 16, 32]}
    plot.draw(planner.sweep(axes, hardware="h200", tpot_ms=30), tmp_path)
    plot.draw(planner.sweep({"model": ["deepseek-v3", "deepseek-v3.2"], "moe": ["fp8", "w4a8"]}, hardware="h200", ep=32), tmp_path)
    assert len(drawn) == 6


def test_roofline_of_a_benchmark(tmp_path):
    picture = tmp_path / "roofline.png"
    assert plot.draw(bench_result(), picture) == [picture]
    assert picture.read_bytes()[:4] == PNG


def test_a_benchmark_without_rows_or_of_a_gpu_has_no_roofline(tmp_path):
    with pytest.raises(ValueError, match="rows is empty"):
        plot.draw({**bench_result(), "rows": []}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="benchmark on a CPU"):
        plot.draw({**bench_result(), "limits": {"read_gbps": 4000}}, tmp_path / "x.png")


def test_as_a_program(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(bench_result()), encoding="utf-8")
    command = [sys.executable, "-m", "flash_mla_kernels.plot", str(tmp_path / "result.json"), str(tmp_path / "x.png")]
    subprocess.run(command, check=True)
    assert (tmp_path / "x.png").read_bytes()[:4] == PNG
    wrong = subprocess.run(command[:-1], capture_output=True, text=True)
    assert wrong.returncode == 1 and "usage: python -m flash_mla_kernels.plot" in wrong.stderr
