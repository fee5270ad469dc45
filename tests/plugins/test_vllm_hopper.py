"""The classes for Hopper, given what vLLM would give them but in host memory, against the definition.

Run by `./run plugin-test`: the classes derive from those of the installed vLLM. What vLLM itself does with them is not seen.
"""

from types import SimpleNamespace

import pytest
import torch

import flash_mla_kernels as fm
from flash_mla_vllm import backend, hopper, sparse
from flash_mla_vllm.decode import DecodeMetadata

SCALE = 0.1147
HEADS = 16


def generator(seed):
    return torch.Generator().manual_seed(seed)


def parts_of(queries):
    """What vLLM hands over: the latent part as the transpose of a product by heads, the rotary part as columns of q."""
    tokens = queries.shape[0]
    latent = queries[..., :512].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((tokens, HEADS, 192), float("nan"), dtype=queries.dtype)
    wide[..., 128:] = queries[..., 512:]
    return latent, wide[..., 128:]


def dense_problem(s_q, seed=3):
    """Rows of padding, length 0 and page 0, as a full graph has them, and a block table that is wider than needed."""
    g = generator(seed)
    lengths = torch.tensor([200, 64, s_q, 0], dtype=torch.int32)
    cache = (torch.randn(9, 64, 576, generator=g) / 10).bfloat16()
    table = torch.zeros(4, 6, dtype=torch.int32)
    table[0, :4], table[1, 0], table[2, 0] = torch.tensor([5, 2, 8, 1]), 3, 7
    queries = (torch.randn(4 * s_q, HEADS, 576, generator=g) / 4).bfloat16()
    plan = fm.get_mla_metadata()[0]
    metadata = DecodeMetadata(block_table=table, seq_lens=lengths, dcp_tot_seq_lens=None, plan=plan)
    return queries, cache, SimpleNamespace(decode=metadata, num_decodes=4)


def dense_impl(returns_lse):
    impl = object.__new__(hopper.FlashMLAHopperImpl)
    impl.scale, impl.kv_lora_rank, impl.need_to_return_lse_for_decode = SCALE, 512, returns_lse
    return impl


def dense_reference(queries, cache, metadata):
    decode = metadata.decode
    out, lse = fm.reference_dense_decode(
        queries.unflatten(0, (4, -1)),
        cache.unsqueeze(-2),
        decode.block_table,
        decode.seq_lens,
        512,
        softmax_scale=SCALE,
        causal=True,
    )
    return out.flatten(0, 1), lse.permute(0, 2, 1).flatten(0, 1)


@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_dense_decode_of_queries_as_vllm_has_them(s_q, whole):
    queries, cache, metadata = dense_problem(s_q)
    q = queries if whole else parts_of(queries)
    out, lse = dense_impl(True).forward_mqa(q, cache, metadata, None)
    expected, expected_lse = dense_reference(queries, cache, metadata)
    assert out.shape == (4 * s_q, HEADS, 512) and (out.double() - expected).abs().max() < 2e-3
    assert (out[3 * s_q :] == 0).all() and (lse[3 * s_q :] == float("-inf")).all()
    assert (lse[: 3 * s_q].double() - expected_lse[: 3 * s_q]).abs().max() < 1e-3
    again, none = dense_impl(False).forward_mqa(q, cache, metadata, None)
    assert none is None and torch.equal(again, out)


def test_queries_that_do_not_divide_are_refused():
    queries, cache, metadata = dense_problem(1)
    with pytest.raises(ValueError, match="q has 3 tokens, expected equally many for each of 4 requests"):
        dense_impl(False).forward_mqa(parts_of(queries[:3]), cache, metadata, None)


@pytest.mark.parametrize("s_q", [1, 2])
def test_dense_decode_over_e4m3(s_q):
    queries, cache, metadata = dense_problem(s_q)
    scale = 0.02
    stored = (cache.float() / scale).to(torch.float8_e4m3fn)
    out, lse = dense_impl(True).forward_mqa(parts_of(queries), stored, metadata, SimpleNamespace(_k_scale_float=scale))
    expected, expected_lse = dense_reference(queries.float(), stored.float() * scale, metadata)
    assert (out.double() - expected).abs().max() < 4e-3
    assert (lse[: 3 * s_q].double() - expected_lse[: 3 * s_q]).abs().max() < 2e-3
    plan = metadata.decode.plan.tile_scheduler_metadata
    dense_impl(True).forward_mqa(parts_of(queries), stored, metadata, SimpleNamespace(_k_scale_float=scale))
    assert metadata.decode.plan.tile_scheduler_metadata is plan, "the second layer planned again"


def sparse_impl():
    impl = object.__new__(sparse.FlashMLASparseHopperImpl)
    impl.softmax_scale = SCALE
    return impl


def sparse_problem(tokens, seed=5):
    g = generator(seed)
    latent, rope = torch.randn(256, 512, generator=g).bfloat16(), torch.randn(256, 64, generator=g).bfloat16()
    pages = torch.zeros(4, 64, 1, 656, dtype=torch.uint8)
    fm.append_kv(latent, rope, torch.arange(256), pages, recipe="vllm")
    queries = (torch.randn(tokens, HEADS, 576, generator=g) / 8).bfloat16()
    lists = torch.stack([torch.randperm(256, generator=g)[:64] for _ in range(tokens)]).to(torch.int32)
    lists[0, 40:] = -1
    lists[-1] = -1
    return queries, pages, lists


def attention(queries, rows, lists):
    """By the definition, in float64, a query at a time."""
    out = torch.zeros(*queries.shape[:2], 512, dtype=torch.float64)
    lse = torch.full(queries.shape[:2], float("inf"), dtype=torch.float64)
    for i, chosen in enumerate(lists):
        keys = rows[chosen[chosen >= 0].long()].double()
        if len(keys):
            scores = queries[i].double() @ keys.T * SCALE
            out[i], lse[i] = torch.softmax(scores, -1) @ keys[:, :512], torch.logsumexp(scores, -1)
    return out, lse


@pytest.mark.parametrize("shape", [(6, 1), (3, 2), (1, 6), (1, 80)])
def test_sparse_attention_over_fp8(shape):
    """Decode, speculative decode, and vLLM's batch of everything, which is one request of many tokens."""
    requests, tokens = shape
    queries, pages, lists = sparse_problem(requests * tokens)
    out, lse = sparse_impl()._fp8_flash_mla_kernel(
        queries.unflatten(0, shape), pages.squeeze(-2), lists.unflatten(0, shape), kernel_metadata=None
    )
    rows = fm.gather_kv(pages, torch.arange(256))
    expected, expected_lse = attention(queries, rows, lists)
    assert out.shape == (*shape, HEADS, 512) and lse.shape == (requests, HEADS, tokens)
    assert (out.flatten(0, 1).double() - expected).abs().max() < 1e-2
    lse = lse.permute(0, 2, 1).flatten(0, 1).double()
    assert (lse[:-1] - expected_lse[:-1]).abs().max() < 2e-3 and (lse[-1] == float("inf")).all()


@pytest.mark.parametrize("padded", [HEADS, 64])
@pytest.mark.parametrize("given", [False, True])
def test_sparse_attention_over_rows_of_16_bits(padded, given):
    queries, pages, lists = sparse_problem(7)
    rows = fm.gather_kv(pages, torch.arange(256), dtype="bfloat16")
    q = torch.full((7, padded, 576), float("nan"), dtype=torch.bfloat16)
    q[:, :HEADS] = queries
    lengths = torch.tensor([40, 64, 64, 64, 10, 64, 0], dtype=torch.int32)
    out = torch.full((7, padded, 512), float("nan"), dtype=torch.bfloat16) if given else None
    got = sparse_impl()._bf16_flash_mla_kernel(
        q,
        rows.view(4, 64, 576),
        lists,
        lengths,
        *([] if padded == HEADS else [HEADS]),
        **({"out": out} if given else {}),
    )
    got, lse = got if sparse.RETURNS_LSE else (got, None)
    lists[4, 10:] = -1
    expected, expected_lse = attention(queries, rows, lists)
    assert got.shape == (7, HEADS, 512) and (got.double() - expected).abs().max() < 1e-2
    if given:
        assert torch.equal(out[:, :HEADS], got)
    if lse is not None:
        assert (lse[:-1].double() - expected_lse[:-1]).abs().max() < 2e-3 and (lse[-1] == float("-inf")).all()


def test_the_class_behind_custom_goes_by_the_model(monkeypatch):
    import vllm.config

    for text_config, expected in (
        (SimpleNamespace(index_topk=2048), sparse.FlashMLASparseHopperBackend),
        (SimpleNamespace(), hopper.FlashMLAHopperBackend),
    ):
        config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text_config))
        monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda config=config: config)
        assert backend.Backend is expected
    assert sparse.FlashMLASparseHopperBackend.is_sparse() and not hopper.FlashMLAHopperBackend.is_sparse()
    assert sparse.FlashMLASparseHopperBackend.get_impl_cls() is sparse.FlashMLASparseHopperImpl
    assert not any("fp4" in name for name in sparse.FlashMLASparseHopperBackend.supported_kv_cache_dtypes)
    with pytest.raises(AttributeError):
        getattr(backend, "Other")  # noqa: B009
