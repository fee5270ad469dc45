"""What the router is told: blocks that came into the prefix cache or left it, and how full the engine is."""

import logging
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional

PERIOD_SECONDS = 0.02  #: between two looks at the engine

_log = logging.getLogger(__name__)


def _signed(block: int) -> int:
    """Dynamo's block hashes are signed 64-bit numbers."""
    return block - (1 << 64) if block >= 1 << 63 else block


def event_of(event: Mapping[str, Any]) -> Dict[str, Any]:
    """A cache event of the engine as KvEventPublisher.publish_batch takes it."""
    block = _signed(event["block"])
    if event["type"] == "removed":
        return {"type": "removed", "block_hashes": [block]}
    parent = event["parent"]
    return {
        "type": "stored",
        "token_ids": event["token_ids"],
        "num_block_tokens": [len(event["token_ids"])],
        "block_hashes": [block],
        "parent_hash": None if parent is None else _signed(parent),
    }


def snapshot_of(load: Mapping[str, int], rank: int = 0) -> Dict[str, Any]:
    """The fields of a ComponentSnapshot of a rank."""
    used, total, looked_up = load["pages_used"], load["pages_total"], load["prefix_tokens_looked_up"]
    return {
        "kv_used_blocks": used,
        "kv_total_blocks": total,
        "gpu_cache_usage": used / total if total else 0.0,
        "dp_rank": rank,
        "kv_cache_hit_rate": load["prefix_tokens_hit"] / looked_up if looked_up else None,
    }


def _try(publish, *arguments):
    """A router that is not told guesses; the engine goes on, and other ranks are told of."""
    try:
        publish(*arguments)
    except Exception:
        _log.exception("something is not told to the router")


class Publishing:
    """A thread that looks at the engine and tells publishers, which Dynamo hands over one by one."""

    def __init__(self, engine, make_snapshot: Callable[..., Any]):
        self._engine, self._make_snapshot = engine, make_snapshot
        self._events: Dict[int, Any] = {}  # by rank
        self._snapshots: Optional[Any] = None
        self._last: Dict[int, Dict[str, Any]] = {}  # by rank
        self._told = False  # events to all ranks' publishers
        self._end = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._starting = threading.Lock()

    def publish_events(self, publisher, ranks: int = 1, rank: int = 0):
        """From now on, blocks that come and go in the cache of the rank; once all ``ranks`` have a publisher, since what has
        been taken from the engine is told once."""
        self._events[rank] = publisher
        if len(self._events) == ranks:
            self._told = True
            self._start()

    def publish_snapshots(self, publisher):
        """From now on, how full the engine is."""
        self._snapshots = publisher
        self._start()

    def stop(self):
        """Nothing is published after it. Twice does no harm."""
        self._end.set()
        with self._starting:
            if self._thread is not None:
                self._thread.join()

    def _start(self):
        with self._starting:
            if self._thread is None and not self._end.is_set():
                self._thread = threading.Thread(target=self._run, name="publishing", daemon=True)
                self._thread.start()

    def _run(self):
        while not self._end.wait(PERIOD_SECONDS):
            _try(self._publish)

    def _publish(self):
        if self._told:
            events: Dict[int, List[Dict[str, Any]]] = {}
            for event in self._engine.take_cache_events():
                events.setdefault(event["rank"], []).append(event_of(event))
            for rank, of in events.items():
                _try(self._events[rank].publish_batch, of)
        if self._snapshots is not None:
            for rank, load in enumerate(self._engine.rank_loads()):
                snapshot = snapshot_of(load, rank)
                if snapshot != self._last.get(rank):
                    _try(self._snapshots.publish, rank, self._make_snapshot(**snapshot))
                    self._last[rank] = snapshot
