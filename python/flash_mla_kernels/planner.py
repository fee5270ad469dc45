"""The planner: what a DeepSeek-style model needs of compute, memory, bandwidth and links, and what limits it.

Requests and results are plain dictionaries; docs/planner.md gives the schema. Everything is computed by the
C++ library. Wrong input raises ``ValueError`` naming the file, key, value and what is allowed.
"""

import json

from . import _C


def run(request):
    """Runs one request (a dict with a "command") and returns its result as a dict."""
    return json.loads(_C.planner_run(json.dumps(request)))


def _flat(request, settings):
    merged = dict(request or {})
    if settings:
        merged["set"] = {**merged.get("set", {}), **settings}
    return merged


def plan(request=None, /, *, explain=False, **settings):
    """Evaluates one plan.

    ``request`` is a plan request; ``settings`` are flat keys put on top of it: ``model``, ``hardware``, ``mode``,
    ``tp``, ``ep``, ``dp``, ``input``, ``output``, ``batch``, ``moe``, ``kv``, ``tpot_ms``, ``card_hour``, ...
    ``explain`` adds every equation with its numbers. A plan that does not fit comes back with ``fits`` false
    and ``problem`` saying why.

    >>> plan(model="deepseek-v3", hardware="h200", ep=16)["decode"]["bottleneck"]
    'memory bandwidth'
    """
    return run({**_flat(request, settings), "command": "plan", "explain": explain})


def deployment(users, tokens_per_s=0, request=None, /, **settings):
    """The fewest cards, and their plan, on which ``users`` generate at a time, each at least ``tokens_per_s`` fast.

    ``request`` and ``settings`` are those of ``plan``; ``tp`` and ``ep`` are searched unless given. "best" is None
    where no plan will do, and "problem" says why.

    >>> deployment(128, 50, model="deepseek-r1", hardware="h200", input=4096)["best"]["cards"]
    24.0
    """
    return run({"command": "deployment", "base": _flat(request, settings), "users": users, "tokens_per_s": tokens_per_s})


def sweep(axes, request=None, /, **settings):
    """Evaluates every combination of ``axes`` (key to list of values) on top of ``request`` and ``settings``."""
    axes = {key: list(values) for key, values in axes.items()}
    return run({"command": "sweep", "base": _flat(request, settings), "axes": axes})


def compare(*cases):
    """Evaluates plan requests side by side; "best" is the index of the best one under its service levels."""
    return run({"command": "compare", "cases": list(cases)})


def calibrate(bench, *, hardware="h200", dtype="bf16"):
    """Fits attention efficiencies to benchmark results (a path, a dict, or a list of them).

    Returns the calibrated hardware profile under "profile", and measured against predicted times under "rows".
    """
    return run({"command": "calibrate", "bench": bench, "hardware": hardware, "dtype": dtype})


def tables():
    """Every number the source article prints, recomputed (``article``) and corrected (``exact``)."""
    return run({"command": "tables"})


def catalog():
    """Names of the shipped models, hardware profiles and measurements."""
    return run({"command": "list"})


def render(result, format="table"):
    """A result as text: "table", "csv" or "json"."""
    return _C.planner_render(json.dumps(result), format)
