"""How the library's threads wait for each other; decided before it is loaded, for libgomp reads its environment once."""

import os
from typing import Dict

from . import _processors

_chosen: Dict[str, object] = {}


def _libgomp_is_loaded():
    # A wheel brings one of its own, whose name has a hash, so that nobody else's is taken for it: it comes with the library.
    libraries = os.path.join(os.path.dirname(os.path.dirname(__file__)), "flash_mla_kernels.libs")
    if os.path.isdir(libraries) and any(name.startswith("libgomp") for name in os.listdir(libraries)):
        return False
    try:
        with open("/proc/self/maps") as maps:
            return any("/libgomp.so" in line for line in maps)
    except OSError:
        return False


def load_library():
    """Imports ``_C`` with what was chosen in the environment, which is afterwards as it was: it is also other libraries'."""
    chosen = _processors.choose_threads()
    wanted = {}
    if chosen["waiting"] == "sleep":
        wanted["GOMP_SPINCOUNT"] = "0"
    if chosen["threads"] < chosen["usable"] and "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(chosen["threads"])
    chosen["in_effect"] = not (wanted and _libgomp_is_loaded())
    _chosen.update(chosen)
    os.environ.update(wanted)
    try:
        from . import _C  # noqa: F401
    finally:
        for name in wanted:
            del os.environ[name]


def threading_info() -> Dict[str, object]:
    """How many threads compute, and how those that wait do so.

    ``threads`` and ``why_threads``: one for every processor that this process may use, no more than its control group's
    quota. ``waiting`` and ``why_waiting``: "sleep" where others use the processors too, "spin" where nobody does,
    "environment" where ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` is set. ``in_effect`` is False where another
    module had loaded libgomp before: import ``flash_mla_kernels`` first, or set ``GOMP_SPINCOUNT`` in the environment.
    """
    return {name: value for name, value in _chosen.items() if name != "usable"}


load_library()
