"""Generation with the small model beside transformers, in one process on the same checkpoint and prompts.

    python3 bench/compare_transformers.py --json compare-transformers.json

Both run greedily in one dtype on the same number of threads, for every batch size:

  prefill   all prompts of --prompt tokens to their first token: batch * prompt / time, in tokens/s
  decode    what --new further tokens of every sequence take, the prefill's time subtracted, in tokens/s

Ours is flash_mla_kernels.LLM with its prefix cache off, which includes scheduling, sampling and text; transformers is
generate() with the default (dynamic) cache and the attention of torch (sdpa), and with each implementation of
the experts that it has, of which the quickest counts. The contenders take turns in rounds, with a pause between
them in which spinning worker threads fall asleep; medians count. Prompts are texts that the model has written.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import statistics
import sys
import time

# A kernel choice pinned from outside would make torch a weaker opponent than the machine allows.
for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(variable, None)

import torch  # noqa: E402
import transformers  # noqa: E402
from provenance import commit, machine_with_torch  # noqa: E402

from flash_mla_kernels import LLM, SamplingParams  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
DTYPES = {"bf16": ("bfloat16", torch.bfloat16), "fp32": ("float32", torch.float32)}
EXPERTS = ("eager", "batched_mm", "grouped_mm")
SETTLE_SECONDS = 0.06


def ours(arguments, precision):
    llm = LLM(arguments.model, device="cpu", precision=precision, num_threads=arguments.threads, prefix_cache=False)

    def generate(prompts, count):
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        return [output.choices[0].token_ids for output in llm.generate(prompts, params, progress=False)]

    return llm, generate


def theirs(arguments, dtype, experts):
    """generate() of transformers; None for an implementation of the experts that it does not have here."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        ).eval()
        model.generation_config.eos_token_id = None

        @torch.inference_mode()
        def generate(prompts, count):
            ids = torch.tensor(prompts)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
            return out[:, ids.shape[1] :].tolist()

        if len(generate([[0, 5, 6]], 2)[0]) != 2:
            raise RuntimeError("generate() did not give the tokens asked for")
        return generate
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        print(f"transformers with experts_implementation={experts!r}: {error}", file=sys.stderr)
        return None


def write_prompts(llm, count, length):
    """That many different texts of `length` tokens."""
    params = SamplingParams(max_tokens=length - 1, temperature=1, ignore_eos=True, n=count, seed=7)
    choices = llm.generate([[0]], params, progress=False)[0].choices
    return [[0, *choice.token_ids] for choice in choices]


def seconds(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def measure(contenders, prompts, arguments):
    """{contender: prefill and decode tokens/s}."""
    batch, new = len(prompts), arguments.new
    first = {name: [] for name in contenders}
    whole = {name: [] for name in contenders}
    for round_ in range(arguments.rounds + 1):  # the first warms up
        for name, generate in contenders.items():
            time.sleep(SETTLE_SECONDS)
            one, all_ = seconds(generate, prompts, 1), seconds(generate, prompts, new + 1)
            if round_ > 0:
                first[name].append(one)
                whole[name].append(all_)
    rates = {}
    for name in contenders:
        prefill = statistics.median(first[name])
        decode = statistics.median(a - b for a, b in zip(whole[name], first[name]))
        rates[name] = {
            "prefill_tokens_per_s": batch * arguments.prompt / prefill,
            "decode_tokens_per_s": batch * new / decode,
            "prefill_ms": prefill * 1e3,
            "decode_step_ms": decode / new * 1e3,
        }
    return rates


def agreement(contenders, prompts):
    """Share of first tokens on which ours and each of the others agree; rounding can turn a close choice."""
    expected = contenders["flash_mla"](prompts, 1)
    return {
        name: sum(a == b for a, b in zip(expected, generate(prompts, 1))) / len(prompts)
        for name, generate in contenders.items()
        if name != "flash_mla"
    }


def wait_for_quiet(limit, patience):
    """Waits until the load average of the last minute is below `limit`; the load that it then is."""
    end = time.monotonic() + patience
    while os.getloadavg()[0] >= limit and time.monotonic() < end:
        time.sleep(2)
    return os.getloadavg()[0]


def print_table(rows):
    print(f"{'batch':>5}  {'phase':8}" + "".join(f"{name:>28}" for name in rows[0]["contenders"]) + f"{'ratio':>8}")
    for row in rows:
        for phase in ("prefill", "decode"):
            cells = "".join(f"{rates[f'{phase}_tokens_per_s']:28.0f}" for rates in row["contenders"].values())
            print(f"{row['batch']:>5}  {phase:8}{cells}{row[f'{phase}_ratio']:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=HERE.parent / "models" / "small")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=float, default=1.5, help="wait until the load average is below this")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for that at most")
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    precision, dtype = DTYPES[arguments.dtype]
    llm, generate = ours(arguments, precision)
    contenders = {"flash_mla": generate}
    for experts in EXPERTS:
        generate = theirs(arguments, dtype, experts)
        if generate:
            contenders[f"transformers, {experts}"] = generate
    if len(contenders) == 1:
        sys.exit("transformers runs with none of its implementations of the experts")

    load = wait_for_quiet(arguments.load, arguments.patience)
    rows = []
    for batch in map(int, arguments.batch.split(",")):
        prompts = write_prompts(llm, batch, arguments.prompt)
        agree = agreement(contenders, prompts)
        rates = measure(contenders, prompts, arguments)
        row = {"batch": batch, "prompt": arguments.prompt, "new": arguments.new, "dtype": arguments.dtype,
               "threads": arguments.threads, "contenders": rates, "first_tokens_equal": agree}  # fmt: skip
        for phase in ("prefill", "decode"):
            key = f"{phase}_tokens_per_s"
            best = max(value[key] for name, value in rates.items() if name != "flash_mla")
            row[f"{phase}_ratio"] = rates["flash_mla"][key] / best
        rows.append(row)
    print_table(rows)
    if arguments.json:
        command = shlex.join(["python3", "bench/compare_transformers.py", *sys.argv[1:]])
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        report = {"machine": {**machine_with_torch(), "transformers": transformers.__version__}, "commit": commit(), "command": command, "date": date,
                  "load_before": load, "load_after": os.getloadavg()[0], "rounds": arguments.rounds,
                  "rows": rows}  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
