#!/usr/bin/env python3
"""lm-eval's local-completions against this server gives what transformers gives, on models/small.

    pip install 'lm-eval[api]' torch transformers
    python3 tests/clients/lm_eval_agrees.py [PROGRAM]

Not part of ./run test: lm-eval takes minutes to install. Scores texts by log-likelihood through lm-eval's own client, and
by transformers' model of the same directory; exit code 1 if a score differs by more than 1e-3 per token, or if the two
disagree on whether a continuation is the likeliest one.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
if len(sys.argv) > 1:
    os.environ["FLASH_MLA_PROGRAM"] = sys.argv[1]

import torch  # noqa: E402
from live_server import Server  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from transformers import DeepseekV3ForCausalLM  # noqa: E402

SMALL = ROOT / "models" / "small"
PAIRS = [
    ("And it came to pass", ", when Solomon had finished the building of the house of the LORD"),
    ("And it came to pass", ", that"),
    ("CHAPTER I\n\nEmma was", " handsome, clever, and rich"),
    ("The family of Dashwood had", " long been settled in Sussex."),
    ("It is a truth universally acknowledged, that", " a single man"),
    ("x" * 300, " zzz"),
]


def expected(oracle, context, continuation):
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = oracle(ids).logits[0, len(context) - 1 : -1].float()
    target = ids[0, len(context) :]
    chosen = torch.log_softmax(logits, -1).gather(1, target[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == target).all())


def main():
    oracle = DeepseekV3ForCausalLM.from_pretrained(SMALL, dtype=torch.float32, attn_implementation="eager").eval()
    server = Server(SMALL, "--precision", "fp32")
    client = LocalCompletionsAPI(
        model="small",
        base_url=f"http://127.0.0.1:{server.port}/v1/completions",
        tokenizer=str(SMALL),
        max_length=2048,
        num_concurrent=1,
    )
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    failed = 0
    for (context, continuation), (score, greedy) in zip(PAIRS, client.loglikelihood(requests)):
        both = client._encode_pair(context, continuation)
        value, likeliest = expected(oracle, *both)
        good = abs(score - value) < 1e-3 * len(both[1]) and greedy == likeliest
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {score:10.4f} {value:10.4f} {greedy!s:5} {likeliest!s:5} {continuation!r}")
    server.stop()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
