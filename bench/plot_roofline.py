"""Draws the roofline picture of a result file of `flash-mla bench` or `flash-mla demo`.

    python3 plot_roofline.py results.json roofline.png

One panel per thread count: the memory and arithmetic roofs that were measured in the same process, and a
point per shape at its arithmetic intensity and achieved rate; hollow points are OpenBLAS on the two matrix
products of the same shape, where it was measured.
"""

import json
import sys


def roofs(limits, dtypes):
    """(label, GFLOP/s) of each arithmetic roof that applies to one of `dtypes`, highest first."""
    found = [("fp32 FMA", limits["fp32_gflops"])]
    if "bfloat16" in dtypes and limits["bf16_gflops"] > limits["fp32_gflops"]:
        found.insert(0, ("bf16 dot products", limits["bf16_gflops"]))
    return found


def draw_panel(axes, limits, rows):
    bandwidth = limits["read_gbps"]
    tops = roofs(limits, {row["dtype"] for row in rows})
    highest = max(value for _, value in tops)
    intensities = [row["intensity"] for row in rows]
    ridge = highest / bandwidth
    left = min([ridge / 8] + [x / 2 for x in intensities])
    right = max([ridge * 8] + [x * 2 for x in intensities])
    axes.plot([left, ridge], [left * bandwidth, highest], color="black",
              label=f"streaming read {bandwidth:.1f} GB/s")
    for (label, value), style in zip(tops, ("-", "--")):
        axes.plot([value / bandwidth, right], [value, value], style, color="black",
                  label=f"{label} {value:.0f} GFLOP/s")
    for index, row in enumerate(rows):
        colour = f"C{index % 10}"
        share = f"{100 * row['limit_fraction']:.0f}% of the limit"
        axes.plot(row["intensity"], row["gflops"], "o", color=colour,
                  label=f"{row['name']}: {row['gflops']:.0f} GFLOP/s, {share}")
        if row.get("sgemm_gflops"):
            axes.plot(row["intensity"], row["sgemm_gflops"], "o", color=colour, fillstyle="none")
    if any(row.get("sgemm_gflops") for row in rows):
        axes.plot([], [], "o", color="grey", fillstyle="none", label="hollow: sgemm of the same products")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min([left * bandwidth] + [row["gflops"] for row in rows]) / 2, highest * 1.5)
    axes.set_xlabel("arithmetic intensity [FLOP per byte of q, KV once and out]")
    axes.set_ylabel("GFLOP/s")
    count = limits["threads"]
    axes.set_title(f"{count} thread{'s' if count != 1 else ''}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower right")


def main(arguments):
    if len(arguments) != 2:
        print("usage: plot_roofline.py RESULTS.json PICTURE.png", file=sys.stderr)
        return 2
    try:
        import matplotlib
    except ImportError:
        print("plot_roofline.py needs matplotlib; install it for this Python", file=sys.stderr)
        return 1
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(arguments[0], encoding="utf-8") as source:
        report = json.load(source)
    panels = [(limits, [row for row in report["rows"] if row["threads"] == limits["threads"]])
              for limits in report["limits"]]
    panels = [(limits, rows) for limits, rows in panels if rows]
    figure, grid = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), 6), squeeze=False)
    for axes, (limits, rows) in zip(grid[0], panels):
        draw_panel(axes, limits, rows)
    machine = report["machine"]
    figure.suptitle(f"flash-mla decode, {machine['cpu']}, {machine['isa']}, commit {report['commit'][:12]}")
    figure.tight_layout()
    figure.savefig(arguments[1], dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
