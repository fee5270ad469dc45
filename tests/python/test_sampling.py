"""Choices of tokens and experts from Python and under FlashInfer's names, against their definitions in torch and float64."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import flash_mla_kernels as fm
from flash_mla_kernels import flashinfer

VOCAB, DRAWS = 40, 20000


def probs(rows=1, seed=0, vocab=VOCAB):
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return (2 * x).softmax(-1)


def distribution(p, top_k=None, top_p=1.0, min_p=0.0, joint=False):
    """Of one row, in float64, sorted whole."""
    p = p.double()
    order = p.argsort(descending=True, stable=True)
    order = order[p[order] >= min_p * p.max()]
    k = len(order) if top_k is None else top_k
    whole = p[order].sum() if joint else p[order[:k]].sum()
    before = p[order].cumsum(0) - p[order]
    kept = order[:k][(before[:k] < top_p * whole) | (top_p >= 1)]
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def expect_distribution(tokens, expected):
    counts = torch.bincount(tokens.long(), minlength=len(expected)).double()
    mean = expected * len(tokens)
    assert counts[expected == 0].sum() == 0
    big = mean >= 8
    chi = ((counts - mean)[big] ** 2 / mean[big]).sum()
    freedom = max(int(big.sum()) - 1, 0)
    assert chi <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@pytest.mark.parametrize(
    "call, limits",
    [
        (flashinfer.sampling_from_probs, {}),
        (flashinfer.top_k_sampling_from_probs, dict(top_k=6)),
        (flashinfer.top_p_sampling_from_probs, dict(top_p=0.6)),
        (flashinfer.min_p_sampling_from_probs, dict(min_p=0.2)),
        (flashinfer.top_k_top_p_sampling_from_probs, dict(top_k=9, top_p=0.8)),
        (flashinfer.top_k_top_p_sampling_from_probs, dict(top_k=9, top_p=0.8, joint=True)),
    ],
)
def test_flashinfers_draws_are_distributed_as_defined(call, limits):
    p = probs()
    indices = torch.zeros(DRAWS, dtype=torch.int64)
    given = {name: value for name, value in limits.items() if name != "joint"}
    order = {} if "top_p" not in limits or "top_k" not in limits else {"filter_apply_order": "top_k_first"}
    if limits.get("joint"):
        order = {"filter_apply_order": "joint"}
    tokens = call(p, **given, indices=indices, seed=5, **order)
    assert tokens.dtype == torch.int64
    expect_distribution(tokens, distribution(p[0], **limits))
    by_row = {name: torch.full((1,), value) for name, value in given.items()}
    again, valid = call(p, **by_row, indices=indices, seed=torch.tensor([5]), return_valid=True, **order)
    assert valid.all() and valid.dtype == torch.bool
    # float32 tensors of 0.6 and 0.8 are other numbers than those: a draw may differ at an edge.
    assert (again != tokens).sum() <= 2


def test_draws_from_logits_are_those_of_the_engine_and_of_nothing_else_in_the_batch():
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1))
    options = dict(top_k=50, top_p=0.9, temperature=0.8)
    seeds, positions = torch.arange(6), torch.tensor([3, 0, 7, 7, 1, 2])
    batch = fm.sample_tokens(
        logits, seed=seeds, position=positions, indices=torch.zeros(6, dtype=torch.int32), **options
    )
    for i in range(6):
        alone = fm.sample_tokens(logits[i : i + 1], seed=int(seeds[i]), position=int(positions[i]), **options)
        assert alone.item() == batch[i].item()
    assert torch.equal(fm.sample_tokens(logits, temperature=0), logits.argmax(-1).int())
    expected = flashinfer.top_k_top_p_sampling_from_logits(logits, 50, 0.9, seed=9)
    assert torch.equal(expected, fm.sample_tokens(logits, top_k=50, top_p=0.9, seed=9))
    assert torch.equal(flashinfer.sampling_from_logits(logits, seed=9), fm.sample_tokens(logits, seed=9))


def test_generators_move_on():
    p = probs(64)
    a, b = (flashinfer.sampling_from_probs(p, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    generator = torch.Generator().manual_seed(3)
    first, second = (flashinfer.sampling_from_probs(p, generator=generator) for _ in range(2))
    assert torch.equal(first, a) and not torch.equal(first, second)


def test_renormalised_probabilities_and_masked_logits():
    p = probs(3, seed=2)
    for got, limits in (
        (flashinfer.top_k_renorm_probs(p, 7), dict(top_k=7)),
        (flashinfer.top_p_renorm_probs(p, 0.5), dict(top_p=0.5)),
        (flashinfer.top_p_renorm_probs(p, torch.full((3,), 0.5)), dict(top_p=0.5)),
        (fm.filter_tokens(p, probabilities=True, min_p=0.3), dict(min_p=0.3)),
    ):
        expected = torch.stack([distribution(row, **limits) for row in p])
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3)).bfloat16() * 50
    k = torch.tensor([1, 5, 40], dtype=torch.int32)
    masked = flashinfer.top_k_mask_logits(logits, k)
    assert masked.dtype == torch.bfloat16
    for row, m, count in zip(logits, masked, k):
        assert m.isfinite().sum() == count and m[m.isfinite()].min() == row.sort(descending=True).values[count - 1]
        assert torch.equal(m[m.isfinite()], row[m.isfinite()])


def test_flashinfers_modules_are_there():
    assert flashinfer.sampling.top_k_mask_logits is flashinfer.top_k_mask_logits
    assert flashinfer.norm.rmsnorm is flashinfer.rmsnorm and flashinfer.rope.apply_rope is flashinfer.apply_rope
    assert flashinfer.activation.silu_and_mul is flashinfer.silu_and_mul
    assert flashinfer.page.append_paged_kv_cache is flashinfer.append_paged_kv_cache
    assert flashinfer.cascade.merge_state is flashinfer.merge_state and flashinfer.mhc.mhc_post is flashinfer.mhc_post


def test_softmax():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(4)) * 9
    temperature = torch.tensor([0.5, 1.0, 2.0])
    expected = (logits.double() / temperature.double()[:, None]).softmax(-1)
    torch.testing.assert_close(flashinfer.softmax(logits, temperature).double(), expected, rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(flashinfer.softmax(logits).double(), logits.double().softmax(-1), rtol=1e-6, atol=1e-37)


def test_chains():
    """FlashInfer's own example: the first draft is accepted, the second is not and becomes token 0."""
    draft = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    target = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    ids = torch.tensor([[2, 1]], dtype=torch.int32)
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(draft, ids, target)
    assert tokens.tolist() == [[2, 0, -1]] and accepted.tolist() == [1] and emitted.tolist() == [1]
    counted = torch.tensor([10], dtype=torch.int32)
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(
        draft, ids, target, counted, counted.clone(), seed=1
    )
    assert accepted is counted and accepted.tolist() == [11] and emitted.tolist() == [11]


def test_chains_are_distributed_as_the_target():
    draft, target = probs(1, seed=5, vocab=8), probs(2, seed=6, vocab=8)
    drafts = flashinfer.sampling_from_probs(draft, torch.zeros(DRAWS, dtype=torch.int32), seed=1)
    many = [x.expand(DRAWS, -1, -1).contiguous() for x in (draft[None], target[None])]
    tokens, accepted, emitted = fm.speculative_sampling(many[0], drafts[:, None], many[1], seed=2)
    expect_distribution(tokens[:, 0], target[0].double() / target[0].double().sum())
    last = tokens[emitted == 1, 1]
    expect_distribution(last, target[1].double() / target[1].double().sum())
    assert torch.equal(accepted, emitted) and (tokens[emitted == 0, 1] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepseeks_routing(dtype):
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(7)).to(dtype)
    bias = (0.1 * torch.randn(256, generator=torch.Generator().manual_seed(8))).to(dtype)
    values, ids = torch.empty(64, 8, dtype=dtype), torch.empty(64, 8, dtype=torch.int32)
    replay = torch.zeros(70, 8, dtype=torch.int16)
    flashinfer.fused_topk_deepseek(logits, bias, 8, 4, 8, 2.5, values, ids, routing_replay_out=replay)
    scores = logits.double().sigmoid()
    choice = scores + bias.double()
    groups = choice.view(64, 8, 32).topk(2).values.sum(-1).topk(4).indices
    kept = torch.zeros(64, 8, dtype=torch.bool).scatter_(1, groups, True).repeat_interleave(32, 1)
    expected = choice.masked_fill(~kept, -math.inf).topk(8)
    # Where two are equal but for rounding either may be chosen.
    clear = (expected.values - choice.gather(1, ids.long())).abs().max(1).values < 1e-6
    assert clear.all()
    weights = scores.gather(1, ids.long())
    weights = weights / weights.sum(-1, keepdim=True) * 2.5
    torch.testing.assert_close(values.double(), weights, rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=0)
    assert torch.equal(replay[:64].int(), ids) and (replay[64:] == 0).all()


def test_routing_of_other_array_libraries():
    logits = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    ids, weights = fm.choose_experts(logits, 3)
    assert isinstance(ids, np.ndarray) and isinstance(weights, np.ndarray)
    scores = np.exp(logits.astype(np.float64))
    scores /= scores.sum(-1, keepdims=True)
    assert (ids == np.argsort(-scores, axis=-1)[:, :3]).all()
    np.testing.assert_allclose(weights, np.take_along_axis(scores, ids, -1), rtol=1e-6)


def test_a_forked_child_runs_on_one_thread_whatever_is_asked_for():
    """OpenMP's threads stay with the parent: a child that waits for them waits for ever."""
    script = """
import os, torch
import flash_mla_kernels as fm
logits, weight = torch.randn(8, 40000), torch.ones(40000)  # torch's threads, too, stay with the parent
calls = lambda: (fm.sample_tokens(logits, seed=1, num_threads=2), fm.choose_experts(logits[:, :256], 8, num_threads=2),
                 fm.rms_norm(logits, weight, num_threads=2))
calls()
child = os.fork()
if child == 0:
    calls()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_bad_input_is_named():
    p = probs(2)
    broken = p.clone()
    broken[1, 3] = math.nan
    empty = torch.zeros(1, VOCAB)
    for call, message in (
        (lambda: flashinfer.sampling_from_probs(broken), "scores[1][3] is nan"),
        (lambda: flashinfer.sampling_from_probs(empty), "scores[0] has no token that is possible"),
        (lambda: flashinfer.top_k_renorm_probs(p, 0), "top_k is 0, expected >= 1"),
        (lambda: fm.sample_tokens(p, top_p="much"), "top_p is 'much'"),
        (lambda: fm.sample_tokens(p, top_k=torch.ones(3, dtype=torch.int32)), "top_k.shape[0] is 3"),
        (lambda: flashinfer.top_k_top_p_sampling_from_probs(p, 1, 0.5, filter_apply_order="p_first"), "'p_first'"),
        (lambda: fm.choose_experts(p, 3, scores="tanh"), "scores is 'tanh'"),
        (lambda: fm.choose_experts(p, 41), "ids.shape[1] (k) is 41"),
        (lambda: fm.choose_experts(p, 0), "k is 0"),
    ):
        with pytest.raises(ValueError) as e:
            call()
        assert message in str(e.value)
    tokens, valid = flashinfer.sampling_from_probs(empty, return_valid=True)
    assert tokens.tolist() == [-1] and valid.tolist() == [False]
