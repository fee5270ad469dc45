"""Text from a DeepSeek-V2 or V3 checkpoint: ``LLM(directory).generate(prompts, SamplingParams(...))``."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Union

from . import _C
from ._C import SamplingParams, TransferOptions

Prompt = Union[str, Sequence[int]]


@dataclass
class Choice:
    """One continuation."""

    index: int
    text: str
    token_ids: List[int]
    finish_reason: str  #: "stop", "length", "cancelled" or "error"
    error: str = ""  #: what went wrong, with "error"
    #: of every token, if asked for: {"token": id, "logprob": value, "top": {id: value}}
    logprobs: List[Dict] = field(default_factory=list)


@dataclass
class Output:
    """What came of one prompt."""

    choices: List[Choice]
    prompt_tokens: int
    cached_tokens: int  #: of the prompt, found in the prefix cache
    completion_tokens: int  #: over all choices
    #: of every token, if asked for, as in Choice.logprobs; the first follows nothing: its "logprob" is None
    prompt_logprobs: List[Dict] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class _Bar:
    """Progress on stderr without tqdm: one line, rewritten at most ten times a second."""

    def __init__(self, total):
        self.total, self.done, self.drawn, self.start = total, 0, 0.0, time.monotonic()

    def show(self, done, tokens):
        now = time.monotonic()
        if done != self.total and now - self.drawn < 0.1:
            return
        self.drawn, self.done = now, done
        filled = 30 * done // self.total
        rate = tokens / max(now - self.start, 1e-9)
        bar = "#" * filled + "-" * (30 - filled)
        sys.stderr.write(f"\r[{bar}] {done}/{self.total} texts, {rate:.0f} tokens/s ")
        sys.stderr.flush()

    def close(self):
        sys.stderr.write("\n")


class _TqdmBar:
    def __init__(self, tqdm, total):
        self.bar, self.start = tqdm(total=total, unit="text"), time.monotonic()

    def show(self, done, tokens):
        if done > self.bar.n:
            self.bar.update(done - self.bar.n)
        rate = tokens / max(time.monotonic() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)

    def close(self):
        self.bar.close()


def _progress_bar(total):
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Bar(total)
    return _TqdmBar(tqdm, total)


class LLM:
    """A model directory in Hugging Face's format (config.json, safetensors, tokenizer.json), ready to generate.

    ``device``: "auto", "cpu" or "cuda". ``precision`` of weights and cache: "auto", "float32" or "bfloat16".
    ``quantize``: of the weights; "none" (as the checkpoint has them), "fp8", "w4a8", or on the CPU "int8" (docs/model.md).
    ``kv_cache``: of the cache's rows; "auto" as precision says, "bfloat16", "float16" (beside precision "float32"), or
    "fp8" for 656 bytes per token and layer instead of 1,152 (on a GPU for models with an indexer).
    ``load_format``: "auto" for the directory's safetensors, "dummy" for random weights in the shape of its config.json.
    ``max_model_len``: tokens of prompt and continuation together, 0 for the positions that the model has.
    ``num_pages``: pages of 64 tokens in the cache, 0 for as many as ``memory_bytes`` holds (0: what
    ``max_batch_size`` sequences of the longest length need, at most 2 GiB, on a GPU nine tenths of its free memory).
    ``max_tokens_per_step`` bounds a step;
    longer prompts are processed in chunks. ``prefix_cache`` computes equal beginnings once. ``batch_invariant``
    gives a request the same bits whatever else is in the batch. ``overlap_steps``: on a GPU the next step is queued
    while the current one runs, with the same tokens. ``num_threads``: 0 for all.
    ``speculative``: "off", "ngram", "mtp" or "auto" for drafts of up to ``draft_tokens`` tokens, which a step checks and
    which leave a text as it is: what came behind the last tokens before, or those of the model's module for multi-token
    prediction; with "auto" the one or, where that has none or guesses better, the other, and only as many as pay.
    ``tp``: ranks that share the model, a divisor of its heads, threads of this process on the CPU, and on GPUs a GPU each or
    the one that ``devices`` has for it (``[0, 0]``: two streams of one); ``dp``: ranks that share
    the experts alone, each (with ``tp`` a group of so many) with a cache and some of the prompts; ``ep``: parts that they are divided
    into, a divisor of ``tp`` times ``dp`` (0: that many); ``expert_placement``: which rank has which experts, "linear",
    "round-robin" or a JSON file.
    ``generation_config``: "auto" for the sampling that the directory's generation_config.json asks for where a call has no
    sampling_params, "none" for SamplingParams' own defaults. ``chat_template``: a Jinja file instead of the directory's own.

    ``kv_tiers``: places beyond the cache where pages are kept, such as "ram:4GiB" and "file:/var/cache/kv,64GiB"
    (docs/serving.md), for which a prompt waits ``kv_tier_wait_seconds`` at most, 0 for as long as computing it would take.

    ``cache_events``: ``AsyncLLM.take_cache_events`` says what the prefix cache holds. ``transfer``: TransferOptions, for prefill
    and decode as two engines.

    Raises ``ValueError`` for a malformed model directory or an option out of range, ``NotImplementedError`` for a
    model that the library does not run.
    """

    def __init__(
        self,
        model,
        *,
        device="auto",
        precision="auto",
        quantize="none",
        kv_cache="auto",
        load_format="auto",
        max_model_len=0,
        num_pages=0,
        memory_bytes=0,
        max_batch_size=128,
        max_tokens_per_step=2048,
        prefix_cache=True,
        batch_invariant=False,
        overlap_steps=True,
        num_threads=0,
        generation_config="auto",
        chat_template="",
        speculative="off",
        draft_tokens=3,
        tp=1,
        devices=(),
        dp=1,
        ep=0,
        expert_placement="linear",
        kv_tiers=(),
        kv_tier_wait_seconds=0.0,
        cache_events=False,
        transfer=None,
    ):
        if generation_config not in ("auto", "none"):
            raise ValueError(f'generation_config is "{generation_config}", expected "auto" or "none"')
        self._engine = _C.Engine(
            os.fspath(model),
            device=device,
            precision=precision,
            quantize=quantize,
            kv_cache=kv_cache,
            load_format=load_format,
            max_model_len=max_model_len,
            num_pages=num_pages,
            memory_bytes=memory_bytes,
            max_batch_size=max_batch_size,
            max_tokens_per_step=max_tokens_per_step,
            prefix_cache=prefix_cache,
            batch_invariant=batch_invariant,
            overlap_steps=overlap_steps,
            num_threads=num_threads,
            generation_config=generation_config == "auto",
            chat_template=os.fspath(chat_template),
            speculative=speculative,
            draft_tokens=draft_tokens,
            tp=tp,
            devices=list(devices),
            dp=dp,
            ep=ep,
            expert_placement=os.fspath(expert_placement),
            kv_tiers=list(kv_tiers),
            kv_tier_wait_seconds=kv_tier_wait_seconds,
            cache_events=cache_events,
            transfer=transfer or TransferOptions(),
        )

    def generate(
        self,
        prompts: Union[Prompt, Sequence[Prompt]],
        sampling_params: Union[SamplingParams, Sequence[SamplingParams], None] = None,
        *,
        progress: bool = True,
    ) -> List[Output]:
        """Continues each prompt (text or token ids); one Output per prompt, in their order.

        ``sampling_params``: one for all, or one per prompt; without, ``default_sampling()``. ``progress``: a bar on stderr. A prompt that cannot run
        (empty, too long, wrong parameters) raises ``ValueError`` before any starts; one that fails later has
        finish_reason "error".
        """
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]
        params = self._params(sampling_params, len(prompts))
        requests = [
            _C.Request(prompt=prompt, sampling=p)
            if isinstance(prompt, str)
            else _C.Request(prompt_token_ids=[int(t) for t in prompt], sampling=p)
            for prompt, p in zip(prompts, params)
        ]
        return self._run(requests, params, progress)

    def chat(
        self,
        conversations,
        sampling_params: Union[SamplingParams, Sequence[SamplingParams], None] = None,
        *,
        chat_template_kwargs: Optional[Dict] = None,
        progress: bool = True,
        continue_final_message: bool = False,
    ) -> List[Output]:
        """Answers conversations: one list of {"role": ..., "content": ...}, or a list of such lists.

        ``continue_final_message``: the last message, the assistant's, is not over, and the answer goes on from it.
        ``chat_template_kwargs``: what the chat template is to see besides, such as {"thinking": True}.
        """
        if len(conversations) > 0 and isinstance(conversations[0], dict):
            conversations = [conversations]
        params = self._params(sampling_params, len(conversations))
        variables = json.dumps(chat_template_kwargs) if chat_template_kwargs else ""
        requests = [
            _C.Request(
                messages=[(m["role"], m["content"]) for m in messages],
                sampling=p,
                continue_final_message=continue_final_message,
                chat_variables=variables,
            )
            for messages, p in zip(conversations, params)
        ]
        return self._run(requests, params, progress)

    def infill(
        self, prefix: str, suffix: str, sampling_params: Union[SamplingParams, None] = None, *, progress: bool = True
    ) -> Output:
        """What stands between two texts, by a model whose tokenizer has tokens to ask for it.

        Raises ``NotImplementedError`` for one that has not.
        """
        params = self._params(sampling_params, 1)
        return self._run([_C.Request(prompt=prefix, suffix=suffix, sampling=params[0])], params, progress)[0]

    def default_sampling(self) -> SamplingParams:
        """What generate and chat do without sampling_params: SamplingParams' defaults, and of them what the model directory's
        generation_config.json says (temperature, top_p, top_k, min_p, repetition_penalty)."""
        return self._engine.default_sampling()

    def tokenize(self, text: str, add_special_tokens: bool = True) -> List[int]:
        return self._engine.tokenize(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._engine.detokenize([int(t) for t in ids])

    def stats(self) -> Dict[str, float]:
        """Counts and mean latencies since the engine was made. ``experts`` has for every mixture layer its number, how often each
        expert has been chosen (``counts``) and how many of the choices each rank has run (``rank_counts``); on the CPU."""
        return self._engine.stats()

    def chrome_trace(self) -> str:
        """The latest steps as Chrome trace events in JSON."""
        return self._engine.chrome_trace()

    @property
    def max_length(self) -> int:
        """Tokens of prompt and continuation together."""
        return self._engine.max_length

    def _params(self, sampling_params, count) -> List[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.default_sampling()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        if len(sampling_params) != count:
            raise ValueError(f"sampling_params has {len(sampling_params)} entries, expected one or {count}")
        return list(sampling_params)

    def _run(self, requests, params, progress) -> List[Output]:
        if not requests:
            return []
        total = sum(max(p.n, p.best_of) for p in params)
        bar = _progress_bar(total) if progress else None
        try:
            results = self._engine.generate(requests, bar.show if bar else None)
            if bar:
                bar.show(total, sum(r["completion_tokens"] for r in results))
        finally:
            if bar:
                bar.close()
        return [
            Output(
                [Choice(index=i, **choice) for i, choice in enumerate(r["choices"])],
                r["prompt_tokens"],
                r["cached_tokens"],
                r["completion_tokens"],
                r["prompt_logprobs"],
            )
            for r in results
        ]
