"""Pictures of results.

    python -m flash_mla_kernels.plot RESULT.json TARGET

Of a benchmark (``flash-mla bench`` or ``demo`` on a CPU) a roofline, TARGET being the picture's file. Of a planner's
result (what ``flash_mla_kernels.planner`` returns and ``flash-mla plan --format json`` prints) a roofline and time bars for one
plan, curves for a sweep, bars for a comparison, TARGET being their folder. Needs matplotlib and nothing else.
"""

import json
import sys
import textwrap
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


def _legend_beside(axes, **kw):
    """To the right of the axes, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, **kw)


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
    figure, axes = pyplot.subplots(figsize=(9.5, 5.5))
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
    _legend_beside(axes, fontsize=8)
    return _save(pyplot, figure, directory / "roofline.png")


def times(result, directory):
    """Compute, memory and communication time of both phases, stacked. Returns the path."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 4.5))
    for axes, phase in zip(panels, ("prefill", "decode")):
        seconds = result[phase]["time_s"]
        bottom = 0.0
        for resource, color in RESOURCES:
            height = seconds[resource] * 1e3
            axes.bar("resources", height, bottom=bottom, color=color, label=resource)
            bottom += height
        axes.bar("step", seconds["step"] * 1e3, color="tab:gray", label="predicted step")
        axes.set(ylabel="ms", title=f"{phase}: {result[phase]['bottleneck']}")
    _legend_beside(panels[-1], fontsize=8)
    return _save(pyplot, figure, directory / "times.png")


def _roofs(limits, dtypes):
    """(label, GFLOP/s) of each arithmetic roof that applies to one of `dtypes`, highest first."""
    found = [("fp32 FMA", limits["fp32_gflops"])]
    if "bfloat16" in dtypes and limits["bf16_gflops"] > limits["fp32_gflops"]:
        found.insert(0, ("bf16 dot products", limits["bf16_gflops"]))
    return found


def _benchmark_panel(axes, limits, rows):
    """One thread count: its roofs, a point per shape, hollow for OpenBLAS on the shape's two matrix products."""
    bandwidth = limits["read_gbps"]
    tops = _roofs(limits, {row["dtype"] for row in rows})
    highest = max(value for _, value in tops)
    intensities = [row["intensity"] for row in rows]
    ridge = highest / bandwidth
    left = min([ridge / 8] + [x / 2 for x in intensities])
    right = max([ridge * 8] + [x * 2 for x in intensities])
    stream = f"streaming read {bandwidth:.1f} GB/s"
    axes.plot([left, ridge], [left * bandwidth, highest], color="black", label=stream)
    for (label, value), style in zip(tops, ("-", "--")):
        roof = f"{label} {value:.0f} GFLOP/s"
        axes.plot([value / bandwidth, right], [value, value], style, color="black", label=roof)
    for index, row in enumerate(rows):
        color = f"C{index % 10}"
        share = f"{row['gflops']:.0f} GFLOP/s, {100 * row['limit_fraction']:.0f}% of the limit"
        axes.plot(row["intensity"], row["gflops"], "o", color=color, label=f"{row['name']}: {share}")
        if row.get("sgemm_gflops"):
            axes.plot(row["intensity"], row["sgemm_gflops"], "o", color=color, fillstyle="none")
    if any(row.get("sgemm_gflops") for row in rows):
        axes.plot([], [], "o", color="grey", fillstyle="none", label="hollow: sgemm of the same products")
    lowest = min([left * bandwidth] + [row["gflops"] for row in rows])
    axes.set(xscale="log", yscale="log", ylim=(lowest / 2, highest * 1.5))
    axes.set(xlabel="arithmetic intensity [FLOP per byte of q, KV once and out]", ylabel="GFLOP/s")
    count = limits["threads"]
    axes.set_title(f"{count} thread{'s' if count != 1 else ''}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower right")


def benchmark(result, path):
    """The roofline of a benchmark on a CPU, a panel per thread count, into the file ``path``; returns it.

    The roofs were measured in the process that measured the shapes.
    """
    if not isinstance(result["limits"], list):
        raise ValueError("limits is not a list; expected the result of a benchmark on a CPU")
    panels = [(limits, [r for r in result["rows"] if r["threads"] == limits["threads"]]) for limits in result["limits"]]
    panels = [(limits, rows) for limits, rows in panels if rows]
    if not panels:
        raise ValueError("rows is empty, so there is nothing to draw")
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), 6), squeeze=False)
    for axes, (limits, rows) in zip(grid[0], panels):
        _benchmark_panel(axes, limits, rows)
    machine = result["machine"]
    figure.suptitle(f"flash-mla decode, {machine['cpu']}, {machine['isa']}, commit {result['commit'][:12]}")
    return _save(pyplot, figure, Path(path))


def _label(row, names):
    return row["name"] if "name" in row else " ".join(f"{name}={row[name]}" for name in names)


def comparison(result, directory):
    """Decode time by resource, one bar per plan that fits, its name beside it. Returns the path."""
    pyplot = _pyplot()
    rows = [row for row in result["rows"] if row.get("fits")]
    names = [textwrap.fill(_label(row, result.get("axes", ())), 32) for row in rows]
    lines = sum(name.count("\n") + 2 for name in names)
    figure, axes = pyplot.subplots(figsize=(9.5, min(200, 1.5 + 0.16 * lines)))
    left = [0.0] * len(rows)
    for resource, color in RESOURCES:
        widths = [row[f"{resource}_ms"] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=color, label=resource)
        left = [a + b for a, b in zip(left, widths)]
    axes.plot([row["tpot_ms"] for row in rows], range(len(rows)), "k|", markersize=14, label="TPOT")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms per decode step", title="Where a decode step goes")
    _legend_beside(axes, fontsize=8)
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
    shown = len(curves) <= 40  # so many names fit beside the curves
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(9.5, max(7, 0.2 * len(curves) if shown else 7)))
    for index, (name, curve) in enumerate(curves.items()):
        curve.sort(key=lambda row: row[along])
        xs = [row[along] for row in curve]
        style = {"marker": ".", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}  # there are ten colours
        label = textwrap.fill(name, 32) if name and shown else None
        top.plot(xs, [row["output_tokens_per_s_card"] for row in curve], label=label, **style)
        bottom.plot(xs, [row["tpot_ms"] for row in curve], **style)
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
        if axes.get_legend_handles_labels()[0]:
            _legend_beside(axes, fontsize=8)
    return _save(pyplot, figure, directory / "sweep.png")


def draw(result, target):
    """Draws every picture that fits the kind of result; returns their paths.

    ``target`` is the folder for a planner's result, and the picture's file for a benchmark's. Raises ``ValueError`` for
    a result that has no picture.
    """
    if "limits" in result and "machine" in result:
        return [benchmark(result, target)]
    directory = Path(target)
    directory.mkdir(parents=True, exist_ok=True)
    command = result.get("command")
    if command == "plan":
        return [roofline(result, directory), times(result, directory)]
    if command in ("sweep", "compare") and not any(row.get("fits") for row in result["rows"]):
        raise ValueError("none of the plans fits, so there is nothing to draw")
    if command == "sweep":
        return [sweep(result, directory)]
    if command == "compare":
        return [comparison(result, directory)]
    raise ValueError(f"no picture for command {command!r}; expected plan, sweep, compare or a benchmark's result")


def main(arguments):
    if len(arguments) != 2:
        raise SystemExit("usage: python -m flash_mla_kernels.plot RESULT.json TARGET")
    with open(arguments[0], encoding="utf-8") as file:
        result = json.load(file)
    try:
        draw(result, arguments[1])
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
