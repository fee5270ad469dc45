"""The block of docs/benchmarks.md about `flash-mla bench --preset h200-shelf` and bench/compare_shelf.py, for readme_table.py."""

import json
import pathlib

RESULTS = "bench/results/h200-shelf.json"
PEERS = ["bench/results/h200-shelf-peers.json", "bench/results/h200-shelf-flashinfer.json"]
ROOT = pathlib.Path(__file__).resolve().parent.parent


def best_peers():
    """Of each row's name: its quickest peer and the microseconds that takes."""
    best = {}
    for path in PEERS:
        if not (ROOT / path).exists():
            continue
        for row in json.loads((ROOT / path).read_text())["rows"]:
            for peer, us in row["peers_us"].items():
                best[row["name"]] = min(best.get(row["name"], (float("inf"), "")), (us, peer))
    return best


def number(us):
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def cells(row, best):
    if not row["measured"]:
        return [row["name"], "no kernel", number(row["floor_us"]), "", "", "", "", ""]
    rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] and row["flop"] > 200 * row["bytes"] else f"{row['gbps']:.0f} GB/s"
    over = f"{row['over_floor']:.2f}" if row["copy_us"] is None else f"{row['over_copy']:.2f}, a copy's"
    us, peer = best.get(row["name"], (None, ""))
    return [row["name"], number(row["us"]), number(row["floor_us"]), over, rate, peer, number(us) if us else "",
            f"{row['us'] / us:.2f}" if us else ""]  # fmt: skip


def shelf_page(results, table, paragraph, short_commit):
    rows, machine, limits, best = results["rows"], results["machine"], results["limits"], best_peers()
    measured = [r for r in rows if r["measured"]]
    compared = [r for r in measured if r["name"] in best]
    ahead = sum(r["us"] <= best[r["name"]][0] for r in compared)
    return [
        *paragraph(
            f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, commit {short_commit(results['commit'])},",
            f"`{RESULTS}` (`{results['command']}`). {sum(r['correct'] for r in measured)} of {len(measured)} measured calls",
            "passed the check in the same process, whose limits are",
            f"{limits['read_gbps']:.0f} GB/s read, {limits['copy_gbps']:.0f} GB/s copied and {limits['matmul_gflops'] / 1e3:.0f} TFLOP/s of products.",
            f"Beside the best peer ({', '.join(f'`{p}`' for p in PEERS)}, same machine, one after the other): {ahead} of {len(compared)} at or below it.",
        ),
        "",
        *table(["call", "µs", "floor, µs", "over it", "", "best peer", "its µs", "over it"], [cells(r, best) for r in rows]),
    ]
