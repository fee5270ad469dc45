"""Pictures of a planner result: a roofline and time bars for one plan, curves for a sweep, bars for a comparison.

Usage: plot.py RESULT.json DIRECTORY. The result is what ``flash_mla.planner`` returns and
``flash-mla plan --format json`` prints. Needs matplotlib and nothing else.
"""

import json
import sys
from pathlib import Path

RESOURCES = (("compute", "tab:blue"), ("memory", "tab:orange"), ("communication", "tab:green"))


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"pictures need matplotlib, which this Python cannot import ({error})") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot, figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def roofline(result, directory):
    """Attainable arithmetic over arithmetic intensity, with every operator of both phases. Returns the path."""
    pyplot = _pyplot()
    hardware = result["hardware"]
    bandwidth = hardware["memory_bandwidth_bytes_s"]
    points = [
        (phase, op)
        for phase in ("prefill", "decode")
        for op in result[phase]["operators"]
        if op["bytes"] > 0 and op["flop"] > 0
    ]
    intensities = [op["flop_per_byte"] for _, op in points]
    low, high = min(intensities + [1.0]) / 3, max(intensities + [1000.0]) * 3
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for name, peak in (("BF16", hardware["peak_bf16_flop_s"]), ("FP8", hardware["peak_fp8_flop_s"])):
        if peak > 0:
            ridge = peak / bandwidth
            axes.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], label=f"{name} roof")
    marks = {"prefill": "s", "decode": "o"}
    colors = pyplot.get_cmap("tab10")
    names = list(dict.fromkeys(op["name"] for _, op in points))
    for phase, op in points:
        seconds = max(op["compute_s"], op["memory_s"])
        axes.plot(
            op["flop_per_byte"],
            op["flop"] / seconds / 1e12,
            marks[phase],
            color=colors(names.index(op["name"]) % 10),
            markersize=9,
            markeredgecolor="black",
            alpha=0.8,
            linestyle="none",
            label=f"{op['name']}, {phase}",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="FLOP per byte of memory traffic",
        ylabel="TFLOP/s per card",
        title=f"{result['model']} on {hardware['name']}, mode {result['mode']}",
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="lower right", fontsize=7)
    return _save(pyplot, figure, directory / "roofline.png")


def times(result, directory):
    """Compute, memory and communication time of both phases, stacked. Returns the path."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 4.5))
    for axes, phase in zip(panels, ("prefill", "decode")):
        seconds = result[phase]["time_s"]
        bottom = 0.0
        for resource, color in RESOURCES:
            height = seconds[resource] * 1e3
            axes.bar("resources", height, bottom=bottom, color=color, label=resource)
            bottom += height
        axes.bar("step", seconds["step"] * 1e3, color="tab:gray", label="predicted step")
        axes.set(ylabel="ms", title=f"{phase}: {result[phase]['bottleneck']}")
        axes.margins(y=0.35)  # room for the legend
        axes.legend(fontsize=8, loc="upper right")
    return _save(pyplot, figure, directory / "times.png")


def _label(row, names):
    return row["name"] if "name" in row else " ".join(f"{name}={row[name]}" for name in names)


def comparison(result, directory):
    """Decode time by resource, one stacked bar per plan that fits. Returns the path."""
    pyplot = _pyplot()
    rows = [row for row in result["rows"] if row.get("fits")]
    names = [_label(row, result.get("axes", ())) for row in rows]
    figure, axes = pyplot.subplots(figsize=(max(6, 0.7 * len(rows)), 5))
    bottom = [0.0] * len(rows)
    for resource, color in RESOURCES:
        heights = [row[f"{resource}_ms"] for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottom, color=color, label=resource)
        bottom = [a + b for a, b in zip(bottom, heights)]
    axes.plot(range(len(rows)), [row["tpot_ms"] for row in rows], "k_", markersize=18, label="TPOT")
    axes.set_xticks(range(len(rows)), names, rotation=45, ha="right", fontsize=7)
    axes.set(ylabel="ms per decode step", title="Where a decode step goes")
    axes.legend()
    return _save(pyplot, figure, directory / "times.png")


def sweep(result, directory):
    """Throughput and TPOT over the axis with most numeric values, one curve per setting of the others."""
    pyplot = _pyplot()
    rows = [row for row in result["rows"] if row.get("fits")]
    axes_names = result["axes"]
    numeric = [name for name in axes_names if all(isinstance(row[name], (int, float)) for row in rows)]
    if not numeric:
        return comparison(result, directory)
    along = max(numeric, key=lambda name: len({row[name] for row in rows}))
    others = [name for name in axes_names if name != along]
    curves = {}
    for row in rows:
        curves.setdefault(" ".join(f"{name}={row[name]}" for name in others), []).append(row)
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    for name, curve in curves.items():
        curve.sort(key=lambda row: row[along])
        xs = [row[along] for row in curve]
        top.plot(xs, [row["output_tokens_per_s_card"] for row in curve], ".-", label=name or None)
        bottom.plot(xs, [row["tpot_ms"] for row in curve], ".-", label=name or None)
    limit = result["slo"]["tpot_ms"]
    if limit > 0:
        bottom.axhline(limit, color="k", linestyle="--", label=f"SLO {limit:g} ms")
    if result["best"] is not None:
        best = result["rows"][result["best"]]
        top.plot(best[along], best["output_tokens_per_s_card"], "k*", markersize=14, label="best under the SLO")
    top.set(ylabel="output tokens/s per card")
    bottom.set(ylabel="TPOT (ms)", xlabel=along)
    for axes in (top, bottom):
        axes.grid(True, alpha=0.25)
        if axes.get_legend_handles_labels()[0] and len(curves) <= 20:
            axes.legend(fontsize=8)
    return _save(pyplot, figure, directory / "sweep.png")


def draw(result, directory):
    """Draws every picture that fits the kind of result into ``directory``; returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    command = result["command"]
    if command == "plan":
        return [roofline(result, directory), times(result, directory)]
    if command in ("sweep", "compare") and not any(row.get("fits") for row in result["rows"]):
        raise ValueError("none of the plans fits, so there is nothing to draw")
    if command == "sweep":
        return [sweep(result, directory)]
    if command == "compare":
        return [comparison(result, directory)]
    raise ValueError(f"no picture for command {command!r}; expected plan, sweep or compare")


def main(arguments):
    if len(arguments) != 2:
        raise SystemExit("usage: plot.py RESULT.json DIRECTORY")
    with open(arguments[0], encoding="utf-8") as file:
        result = json.load(file)
    try:
        draw(result, arguments[1])
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
