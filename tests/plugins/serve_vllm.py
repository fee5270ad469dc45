"""One vLLM on the CPU, in a process of its own: greedy tokens of prompts, and which backend made them.

    serve_vllm.py MODEL PROMPTS.json RESULT.json

PROMPTS.json: lists of token ids. They are served at once, then again one by one, then at once with a wrong softmax scale in
each call of our decode: the control that the test would see a wrong kernel.
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams

NEW_TOKENS = 24


def prepare(worker):
    """In the worker: notes the calls of our decode. Returns the classes of the attention layers."""
    import flash_mla_vllm.decode as plugin

    called = plugin.flash_mla_with_kvcache
    worker.flash_mla_calls, worker.flash_mla_factor = [], 1.0

    def noted(q, *arguments, softmax_scale, **options):
        worker.flash_mla_calls.append(list(q.shape))
        return called(q, *arguments, softmax_scale=softmax_scale * worker.flash_mla_factor, **options)

    plugin.flash_mla_with_kvcache = noted
    impls = [getattr(module, "impl", None) for module in worker.get_model().modules()]
    return [f"{type(x).__module__}.{type(x).__qualname__}" for x in impls if hasattr(x, "kv_lora_rank")]


def shapes_called(worker):
    return worker.flash_mla_calls


def break_the_scale(worker):
    worker.flash_mla_factor = 1.3


def logprobs_of(completion):
    return [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    prompts = [{"prompt_token_ids": tokens} for tokens in json.loads(arguments.prompts.read_text())]
    llm = LLM(
        arguments.model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enforce_eager=True,
        # With vLLM's own operators for CPUs, which eager mode would take, the tokens are not transformers' whatever the
        # backend: the rotary one is given views here.
        compilation_config={"custom_ops": ["none"]},
        attention_config={"backend": "CPU_MLA"},
        kv_cache_memory_bytes=1 << 27,
    )
    impls = llm.collective_rpc(prepare)[0]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1, detokenize=False)

    def serve(prompts):
        return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]

    at_once = serve(prompts)
    one_by_one = [serve([prompt])[0] for prompt in prompts]
    calls = llm.collective_rpc(shapes_called)[0]
    llm.collective_rpc(break_the_scale)
    result = {
        "impls": impls,
        "calls": calls,
        "at_once": [list(completion.token_ids) for completion in at_once],
        "logprobs": [logprobs_of(completion) for completion in at_once],
        "one_by_one": [list(completion.token_ids) for completion in one_by_one],
        "broken": [list(completion.token_ids) for completion in serve(prompts)],
    }
    arguments.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
