"""The worker's command line."""

import argparse
import os
from pathlib import Path

ROLES = {"agg": "none", "prefill": "prefill", "decode": "decode"}  #: Dynamo's names, and TransferOptions'


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m flash_mla.dynamo",
        description="A worker of NVIDIA Dynamo over the flash_mla engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model directory in Hugging Face's format")
    add("--served-model-name", metavar="NAME", help="what requests call it; default: the directory's name")

    of = parser.add_argument_group("Dynamo").add_argument
    of("--namespace", default=os.environ.get("DYN_NAMESPACE", "dynamo"), help="of Dynamo's discovery")
    of("--component", help='default: "backend", of a prefill worker "prefill"')
    of("--endpoint", default="generate", help="of the component")
    of("--discovery-backend", default=os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"), help="kubernetes, etcd, file or mem")
    of("--request-plane", default=os.environ.get("DYN_REQUEST_PLANE", "tcp"), help="tcp or nats")
    of("--event-plane", default=os.environ.get("DYN_EVENT_PLANE"), help="zmq or nats; default: Dynamo's")
    of("--host", default="127.0.0.1", metavar="ADDRESS", help="of this machine, for all planes and /metrics; DYN_..._HOST go first")
    of("--endpoint-types", default="chat,completions", help="what the frontend offers")
    of("--tool-call-parser", help="of the frontend, for this model")
    of("--reasoning-parser", help="of the frontend, for this model")
    of("--no-kv-events", action="store_true", help="the router is not told what the prefix cache holds")

    of = parser.add_argument_group("prefill and decode apart").add_argument
    of("--disaggregation-mode", choices=tuple(ROLES), default="agg", help="what the worker does of a request")
    of("--transport", choices=("shm", "nixl"), default="shm", help="of pages: within a machine, or NIXL's C library")
    of("--bootstrap-host", metavar="ADDRESS", help="prefill: that decode workers connect to; default: --host")
    of("--bootstrap-port", type=int, default=0, help="prefill: port for them; 0 takes any free one")
    of("--advertise-host", help="prefill: how others name --bootstrap-host, if not by that")
    of("--peer", action="append", metavar="HOST:PORT", help="decode: a prefill worker that may be asked, as requests name it; default: any")
    of("--peer-key", default=os.environ.get("FLASH_MLA_PEER_KEY", ""), help="that prefill and decode workers share")
    of("--lease", type=float, default=60.0, metavar="SECONDS", help="that either side waits for the other")
    of("--transfer-memory-bytes", type=int, default=1 << 30, help="decode: host memory for pages on their way")
    of("--layerwise-tokens", type=int, default=8192, help="prefill: longer prompts are sent while they are computed")

    of = parser.add_argument_group("engine (as LLM's options)").add_argument
    of("--device", choices=("auto", "cpu", "cuda"), default="auto")
    of("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    of("--quantize", choices=("none", "int8", "fp8", "w4a8"), default="none")
    of("--kv-cache", choices=("auto", "bfloat16", "float16", "fp8"), default="auto")
    of("--load-format", choices=("auto", "dummy"), default="auto")
    of("--max-model-len", type=int, default=0)
    of("--num-pages", type=int, default=0)
    of("--memory-bytes", type=int, default=0)
    of("--max-batch-size", type=int, default=128)
    of("--max-tokens-per-step", type=int, default=2048)
    of("--num-threads", type=int, default=0)
    of("--tp", type=int, default=1, help="ranks that share the model")
    of("--dp", type=int, default=1, help="ranks with caches of their own, which the router chooses between")
    of("--ep", type=int, default=0, help="parts that the experts are divided into")
    of("--batch-invariant", action="store_true")
    of("--speculative", choices=("off", "ngram", "mtp", "auto"), default="off")
    of("--kv-tier", action="append", metavar="SPEC", help="such as ram:4GiB; several are asked in their order")
    return parser


def parse(argv=None):
    """The options; ends the process with what is wrong with them."""
    arguments = _parser().parse_args(argv)
    arguments.served_model_name = arguments.served_model_name or Path(arguments.model).resolve().name
    arguments.bootstrap_host = arguments.bootstrap_host or arguments.host
    arguments.component = arguments.component or ("prefill" if arguments.disaggregation_mode == "prefill" else "backend")
    # Dynamo reads these when its runtime is made. What it takes without them is any address of the machine.
    for plane in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "SYSTEM"):
        os.environ.setdefault(f"DYN_{plane}_HOST", arguments.host)
    return arguments


def engine_options(arguments):
    """AsyncLLM's."""
    from ..async_llm import TransferOptions

    role = ROLES[arguments.disaggregation_mode]
    transfer = TransferOptions(
        role=role,
        transport=arguments.transport,
        host=arguments.bootstrap_host,
        port=arguments.bootstrap_port,
        peers=(arguments.peer or ["*"]) if role == "decode" else [],
        key=arguments.peer_key,
        lease_seconds=arguments.lease,
        memory_bytes=arguments.transfer_memory_bytes,
        layerwise_tokens=arguments.layerwise_tokens,
    )
    names = (
        "device", "precision", "quantize", "kv_cache", "load_format", "max_model_len", "num_pages", "memory_bytes",
        "max_batch_size", "max_tokens_per_step", "num_threads", "tp", "dp", "ep", "batch_invariant", "speculative",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names}
    return {**options, "kv_tiers": arguments.kv_tier or (), "cache_events": True, "transfer": transfer}
