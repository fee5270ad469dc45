"""What the router is told: blocks that came into the prefix cache or left it, and how full the engine is."""

import logging
import threading
from typing import Any, Callable, Dict, Mapping, Optional

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


def snapshot_of(load: Mapping[str, int]) -> Dict[str, Any]:
    """The fields of a ComponentSnapshot."""
    used, total, looked_up = load["pages_used"], load["pages_total"], load["prefix_tokens_looked_up"]
    return {
        "kv_used_blocks": used,
        "kv_total_blocks": total,
        "gpu_cache_usage": used / total if total else 0.0,
        "dp_rank": 0,
        "kv_cache_hit_rate": load["prefix_tokens_hit"] / looked_up if looked_up else None,
    }


class Publishing:
    """A thread that looks at the engine and tells publishers, which Dynamo hands over one by one."""

    def __init__(self, engine, make_snapshot: Callable[..., Any]):
        self._engine, self._make_snapshot = engine, make_snapshot
        self._events: Optional[Any] = None
        self._snapshots: Optional[Any] = None
        self._last: Optional[Dict[str, Any]] = None
        self._end = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._starting = threading.Lock()

    def publish_events(self, publisher):
        """From now on, blocks that come and go."""
        self._events = publisher
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
            try:
                self._publish()
            except Exception:  # a router that is not told guesses; the engine goes on
                _log.exception("nothing is told to the router")

    def _publish(self):
        if self._events is not None:
            events = self._engine.take_cache_events()
            if events:
                self._events.publish_batch([event_of(event) for event in events])
        if self._snapshots is not None:
            snapshot = snapshot_of(self._engine.load())
            if snapshot != self._last:
                self._snapshots.publish(0, self._make_snapshot(**snapshot))
                self._last = snapshot
