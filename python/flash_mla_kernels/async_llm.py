"""Tokens in, tokens out, in asyncio: what a server of another's (Dynamo's, say) drives.

    llm = AsyncLLM(directory)
    async for event in llm.generate([1, 2, 3], SamplingParams(max_tokens=8)):
        print(event["token_ids"])
    llm.close()
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

from . import _C
from ._C import SamplingParams, TransferOptions
from .llm import LLM

__all__ = ["AsyncLLM", "SamplingParams", "TransferOptions"]


@dataclass
class _Named:
    """A request by its caller's name."""

    number: Optional[int] = None  # the engine's; None before it has it
    aborted: bool = False


class AsyncLLM:
    """An LLM whose steps run in a thread of their own, for callers in one event loop.

    ``options`` are LLM's. All methods are to be called in the thread of that loop.
    """

    def __init__(self, model, **options):
        self._engine = LLM(model, **options)._engine
        self._queue = _C.EventQueue()
        self._requests: Dict[int, asyncio.Queue] = {}
        self._names: Dict[str, _Named] = {}
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._engine.start()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        request_id: Optional[str] = None,
        *,
        bootstrap: Optional[Tuple[str, int, int]] = None,
        data_parallel_rank: Optional[int] = None,
    ) -> AsyncIterator[Dict]:
        """The request's events, as they come: dicts with ``index`` (which of the n continuations), ``token_ids``, ``text``,
        ``logprobs``, ``finish_reason`` ("" while it goes on, then "stop", "length", "cancelled" or "error" with ``error``),
        ``prompt_tokens``, ``cached_tokens`` and ``completion_tokens``; the last one of all has ``last``.

        ``request_id``: the caller's name for it, for ``abort``. ``bootstrap``: host, port and room where a prefill and a decode
        engine meet (``transfer``). ``data_parallel_rank``: which of the ranks with caches of their own (``dp``) runs it; None: the
        engine chooses. A generator that is closed, or whose task is cancelled, before its end ends the request.
        Raises ``ValueError`` for a request that cannot run, or whose name another one has that runs.
        """
        loop = asyncio.get_running_loop()
        self._listen(loop)
        if request_id in self._names:
            raise ValueError(f"request_id is {request_id!r}, expected a name that no running request has")
        named = _Named()
        if request_id is not None:
            self._names[request_id] = named
        try:
            # A grammar takes up to a second.
            await loop.run_in_executor(None, self._engine.prepare, sampling_params)
            request = _C.Request(
                prompt_token_ids=list(prompt_token_ids),
                sampling=sampling_params,
                bootstrap=bootstrap,
                data_parallel_rank=data_parallel_rank,
            )
            named.number = self._engine.submit(request, self._queue)
            events = self._requests[named.number] = asyncio.Queue()
            if named.aborted:
                self._engine.cancel(named.number)
            while True:
                event = await events.get()
                yield event
                if event["last"]:
                    return
        finally:
            if request_id is not None:
                del self._names[request_id]
            if named.number is not None:
                self._requests.pop(named.number, None)
                self._engine.cancel(named.number)  # without effect on one that has ended

    def abort(self, request_id: str):
        """Ends the request of that name at the next step, with finish_reason "cancelled"; without effect if there is none."""
        named = self._names.get(request_id)
        if named is not None:
            named.aborted = True
            if named.number is not None:
                self._engine.cancel(named.number)

    def _listen(self, loop):
        if self._loop is loop:
            return
        if self._loop is not None:
            raise RuntimeError("AsyncLLM: another event loop than that of the first call")
        loop.add_reader(self._queue.fileno(), self._deliver)
        self._loop = loop

    def _deliver(self):
        for event in self._queue.take():
            events = self._requests.get(event["request"])
            if events is not None:  # else nobody waits for it any more
                events.put_nowait(event)

    def load(self) -> Dict[str, int]:
        """How full the engine is: ``running`` and ``waiting`` sequences, ``pages_used``, ``pages_cached`` and ``pages_total``,
        ``prefix_tokens_looked_up`` and ``prefix_tokens_hit``. Cheap."""
        return self._engine.load()

    def rank_loads(self) -> List[Dict[str, int]]:
        """``load`` of each rank with a cache of its own (``dp``). Requests that have no rank yet count in ``load`` alone."""
        return self._engine.rank_loads()

    def take_cache_events(self) -> List[Dict]:
        """With ``cache_events=True``, what has come into the prefix cache, or left it, since the last call, in its order: dicts
        with ``type`` ("stored", "removed"), ``block`` (an unsigned 64-bit number, equal in every engine for equal tokens from
        the sequence's first on) and ``rank``; of one that is stored ``parent``, the block before it or None, and its 64
        ``token_ids``."""
        return self._engine.take_cache_events()

    def stats(self) -> Dict:
        """As ``LLM.stats``; ``transfer`` has the port of a prefill engine."""
        return self._engine.stats()

    def default_sampling(self) -> SamplingParams:
        """As ``LLM.default_sampling``."""
        return self._engine.default_sampling()

    def tokenize(self, text: str, add_special_tokens: bool = True) -> List[int]:
        return self._engine.tokenize(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._engine.detokenize([int(t) for t in ids])

    @property
    def max_length(self) -> int:
        """Tokens of prompt and continuation together."""
        return self._engine.max_length

    def close(self):
        """Ends all requests as cancelled and the thread of the steps. Twice does no harm."""
        self._engine.stop()
        if self._loop is not None and not self._loop.is_closed():
            self._deliver()
            with contextlib.suppress(ValueError):
                self._loop.remove_reader(self._queue.fileno())
        self._loop = None
