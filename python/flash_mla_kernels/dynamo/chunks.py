"""What the engine says, in Dynamo's words."""

from typing import Any, Callable, Dict, Mapping, Sequence


def chunk_of(event: Mapping[str, Any], detokenize: Callable[[Sequence[int]], str]) -> Dict[str, Any]:
    """A chunk of an answer. Raises ``RuntimeError`` for an event that ends its request with an error."""
    if event["finish_reason"] == "error":
        raise RuntimeError(event["error"])
    chunk: Dict[str, Any] = {"token_ids": event["token_ids"], "index": event["index"]}
    if event["logprobs"]:
        chunk["log_probs"] = [one["logprob"] for one in event["logprobs"]]
        if any(one["top"] for one in event["logprobs"]):
            chunk["top_logprobs"] = [_top(one["top"], detokenize) for one in event["logprobs"]]
    if event["finish_reason"]:
        chunk["finish_reason"] = event["finish_reason"]
        prompt, completion = event["prompt_tokens"], event["completion_tokens"]
        chunk["completion_usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": event["cached_tokens"]},
        }
    return chunk


def _top(top, detokenize):
    return [
        {"rank": rank, "token_id": token, "token": detokenize([token]), "logprob": logprob}
        for rank, (token, logprob) in enumerate(top.items(), 1)
    ]
