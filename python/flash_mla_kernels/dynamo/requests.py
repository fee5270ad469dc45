"""What Dynamo's frontend asks, in the engine's words."""

from typing import Any, Dict, Mapping, Optional, Tuple

from ..async_llm import SamplingParams

_PLAIN = ("n", "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")
_REFUSED = ("use_beam_search",)  # what would be ignored in silence


def sampling_of(request: Mapping[str, Any], max_length: int, defaults: SamplingParams) -> SamplingParams:
    """SamplingParams of a request's ``sampling_options``, ``stop_conditions`` and ``output_options``; what they leave open is
    as in ``defaults``. Without ``max_tokens`` a text may be as long as the model and the cache allow.

    Raises ``ValueError`` for what the engine does not do, or a value out of range.
    """
    options = request.get("sampling_options") or {}
    stop = request.get("stop_conditions") or {}
    output = request.get("output_options") or {}
    for name in _REFUSED:
        if options.get(name):
            raise ValueError(f"{name} is {options[name]!r}, expected none: the engine has no such thing")
    if output.get("prompt_logprobs") is not None:
        raise ValueError("prompt_logprobs: not through Dynamo yet")
    fields: Dict[str, Any] = {
        name: getattr(defaults, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    fields.update({name: options[name] for name in _PLAIN if options.get(name) is not None})
    if options.get("top_k") is not None:
        fields["top_k"] = max(options["top_k"], 0)  # -1 is all there, 0 here
    if options.get("logit_bias"):
        fields["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    if options.get("include_stop_str_in_output"):
        fields["include_stop"] = True
    best_of = options.get("best_of")
    if best_of is not None and best_of > fields.get("n", 1):
        raise ValueError(f"best_of is {best_of}, expected at most n, {fields.get('n', 1)}")
    fields.update(_format_of(options.get("guided_decoding")))
    fields.update(_end_of(stop, bool(fields.keys() & {"json_schema", "json_object", "regex", "choice", "grammar"})))
    left = max_length - len(request["token_ids"])
    limit = stop.get("max_tokens")
    fields["max_tokens"] = max(left, 1) if limit is None else limit
    if stop.get("min_tokens"):
        fields["min_tokens"] = min(stop["min_tokens"], fields["max_tokens"])
    if output.get("logprobs") is not None:
        fields["logprobs"] = output["logprobs"]
    return SamplingParams(**fields)


def _end_of(stop, formatted):
    fields: Dict[str, Any] = {"ignore_eos": bool(stop.get("ignore_eos"))}
    tokens = {*(stop.get("stop_token_ids") or ()), *(stop.get("stop_token_ids_hidden") or ())}
    # The model's own end of sentence is among them, which ignore_eos is about.
    if tokens and not fields["ignore_eos"]:
        fields["stop_token_ids"] = sorted(tokens)
    # The frontend cuts texts at these; here they end what would be cut off. A format has an end of its own.
    if stop.get("stop") and not formatted:
        fields["stop"] = list(stop["stop"])
    return fields


def _format_of(guided):
    """Of guided_decoding, which has one of these and else None."""
    guided = guided or {}
    if guided.get("structural_tag") is not None:
        raise ValueError("guided_decoding.structural_tag: expected json, regex, choice or grammar")
    fields = {}
    if guided.get("json") is not None:
        # A schema's text, or the schema.
        fields["json_schema"] = guided["json"]
    for name in ("regex", "choice", "grammar"):
        if guided.get(name):
            fields[name] = guided[name]
    return fields


def room_of(request: Mapping[str, Any]) -> Optional[Tuple[str, int, int]]:
    """Host, port and room of ``bootstrap_info``, or of what a prefill worker has answered; None if there is neither."""
    answered = (request.get("prefill_result") or {}).get("disaggregated_params")
    for info in (request.get("bootstrap_info"), answered):
        if info and info.get("bootstrap_room") is not None:
            return info["bootstrap_host"], info["bootstrap_port"], info["bootstrap_room"]
    return None
