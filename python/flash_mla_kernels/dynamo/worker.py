"""The engine as Dynamo 1.6 wants to see one: started, asked, told to stop."""

import contextlib
import functools
import logging
import secrets

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.dp_rank import forced_dp_rank, validate_global_dp_rank
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.metrics import register_engine_registry
from dynamo.common.backend.publisher import ComponentSnapshot, PushSource
from dynamo.common.constants import DisaggregationMode
from dynamo.common.utils.token_ids import normalize_request_token_ids
from dynamo.llm.exceptions import InvalidArgument

from ..async_llm import AsyncLLM
from .arguments import engine_options
from .chunks import chunk_of
from .metrics import registry_of
from .publishing import Publishing
from .requests import room_of, sampling_of

PAGE_SIZE = 64

_log = logging.getLogger(__name__)


class Worker(LLMEngine):
    """Of one of three roles: "agg" answers requests; "prefill" computes a prompt, whose pages "decode" goes on with. Where
    the pages do not come, or the router has no prefill worker, "decode" computes the prompt itself."""

    def __init__(self, arguments):
        self._arguments = arguments
        self._role = arguments.disaggregation_mode
        self._llm = None
        self._publishing = None
        self._address = None  # of a prefill worker, for decode workers

    @classmethod
    def of(cls, arguments):
        """A worker, not started yet, and how Dynamo is to run it."""
        config = WorkerConfig(
            namespace=arguments.namespace,
            component=arguments.component,
            endpoint=arguments.endpoint,
            model_name=arguments.model,
            served_model_name=arguments.served_model_name,
            endpoint_types=arguments.endpoint_types,
            discovery_backend=arguments.discovery_backend,
            request_plane=arguments.request_plane,
            event_plane=arguments.event_plane,
            tool_call_parser=arguments.tool_call_parser,
            reasoning_parser=arguments.reasoning_parser,
            disaggregation_mode=DisaggregationMode(arguments.disaggregation_mode),
        )
        return cls(arguments), config

    @classmethod
    async def from_args(cls, argv=None):
        from .arguments import parse

        return cls.of(parse(argv))

    async def start(self, worker_id):
        arguments = self._arguments
        self._llm = AsyncLLM(arguments.model, **engine_options(arguments))
        self._publishing = Publishing(self._llm, ComponentSnapshot)
        if self._role == "prefill":
            port = self._llm.stats()["transfer"]["port"]
            self._address = (arguments.advertise_host or arguments.bootstrap_host, port)
            _log.info("prefill: decode workers meet it at %s:%d", *self._address)
        host, port = self._address or (None, None)
        return EngineConfig(
            model=arguments.model,
            served_model_name=arguments.served_model_name,
            llm=LlmRegistration(
                context_length=self._llm.max_length,
                kv_cache_block_size=PAGE_SIZE,
                total_kv_blocks=self._llm.rank_loads()[0]["pages_total"],
                data_parallel_size=arguments.dp,
                max_num_seqs=arguments.max_batch_size,
                max_num_batched_tokens=arguments.max_tokens_per_step,
                bootstrap_host=host,
                bootstrap_port=port,
            ),
        )

    async def generate(self, request, context):
        normalize_request_token_ids(request)
        room = self._room(request)
        try:
            sampling = sampling_of(request, self._llm.max_length, self._llm.default_sampling())
            if self._role == "prefill" and room:
                # The router gives this to a decode worker at once: both sides meet while the prompt is computed.
                yield {"token_ids": [], "index": 0, "disaggregated_params": _params_of(room)}
            rank = validate_global_dp_rank(forced_dp_rank(request), 0, self._arguments.dp, "flash_mla's")
            events = self._llm.generate(
                request["token_ids"], sampling, context.id(), bootstrap=room, data_parallel_rank=rank
            )
            async with contextlib.aclosing(events):  # a request whose caller is gone ends here
                async for event in events:
                    yield chunk_of(event, self._llm.detokenize)
        except ValueError as e:
            raise InvalidArgument(str(e)) from e

    def _room(self, request):
        room = room_of(request) if self._role != "agg" else None
        if room is None and self._role == "prefill" and not request.get("_HEALTH_CHECK"):
            return (*self._address, secrets.randbits(63))  # a router that waits for the answer takes it from there
        return room

    async def abort(self, context):
        self._llm.abort(context.id())

    async def kv_event_sources(self):
        if self._role == "decode" or self._arguments.no_kv_events:
            return []  # prefixes are looked for where prompts are computed
        ranks = self._arguments.dp
        return [
            PushSource(on_ready=functools.partial(self._publishing.publish_events, ranks=ranks, rank=rank), dp_rank=rank)
            for rank in range(ranks)
        ]

    def component_metrics_dp_ranks(self):
        return list(range(self._arguments.dp))

    def attach_snapshot_publisher(self, publisher):
        self._publishing.publish_snapshots(publisher)

    async def register_prometheus(self, metrics):
        register_engine_registry(metrics, registry_of(self._llm.stats))

    async def health_check_payload(self):
        return build_health_check_payload(bos_token_id=self._llm.tokenize("a")[0])

    async def is_quiescent(self):
        return self._llm.stats()["transfer"]["open"] == 0

    async def cleanup(self):
        if self._publishing is not None:
            self._publishing.stop()
        if self._llm is not None:
            self._llm.close()
        self._llm = self._publishing = None


def _params_of(room):
    host, port, number = room
    return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": number}
