"""The classes for Hopper, given what vLLM would give them but in host memory, against the definition.

Run by `./run plugin-test`: the classes derive from those of the installed vLLM. What vLLM itself does with them is not seen.
"""

from types import SimpleNamespace

import pytest
import torch

import flash_mla_kernels as fm
from flash_mla_vllm import backend, decode, hopper, prefill, sparse
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


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_requests_bits_do_not_depend_on_the_batch(e4m3, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert hopper.FlashMLAHopperBackend.supports_batch_invariance() and decode.fixed_split_blocks() > 0
    g = generator(9)
    lengths = torch.tensor([2500, 70, 1900], dtype=torch.int32)
    cache = (torch.randn(128, 64, 576, generator=g) / 10).bfloat16()
    table = torch.randperm(128, generator=g)[: 3 * 40].to(torch.int32).view(3, 40)
    queries = (torch.randn(3, HEADS, 576, generator=g) / 4).bfloat16()
    if e4m3:
        cache = (cache.float() / 0.02).to(torch.float8_e4m3fn)

    def run(requests):
        plan = fm.get_mla_metadata()[0]
        step = DecodeMetadata(block_table=table[requests], seq_lens=lengths[requests], dcp_tot_seq_lens=None, plan=plan)
        metadata = SimpleNamespace(decode=step, num_decodes=len(requests))
        return dense_impl(True).forward_mqa(queries[requests], cache, metadata, SimpleNamespace(_k_scale_float=0.02))

    out, lse = run([0, 1, 2])
    for i in range(3):
        alone, lse_alone = run([i])
        assert torch.equal(alone[0], out[i]) and torch.equal(lse_alone[0], lse[i])


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


def prefill_by_definition(q, k_nope, k_rope, v, starts_q, starts_k, *, softmax_scale, causal, out=None):
    """dense_prefill's contract in float64, since the kernel runs on a GPU alone."""
    result = torch.zeros(q.shape[0], q.shape[1], 128, dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), float("inf"), dtype=torch.float64)
    assert starts_q.dtype == starts_k.dtype == torch.int32 and k_rope.dim() == 2
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if m == 0:
            continue
        rope = k_rope[keys, None].expand(-1, q.shape[1], -1)
        scores = torch.einsum("ihd,jhd->hij", q[rows].double(), torch.cat((k_nope[keys], rope), -1).double())
        scores *= softmax_scale
        if causal:
            scores.masked_fill_(torch.ones(n, m).triu(m - n + 1).bool(), float("-inf"))
        result[rows] = torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1), v[keys].double())
        lse[:, rows] = torch.logsumexp(scores, -1)
    return (result if out is None else out.copy_(result)), lse


def test_a_prompt_in_chunks_is_the_prompt(monkeypatch):
    """New tokens and two parts of what is in the cache, merged, against all keys at once; keys as vLLM puts them together."""
    monkeypatch.setattr(prefill, "dense_prefill", prefill_by_definition)
    g = generator(9)
    new, before = [5, 3], [[4, 0], [2, 7]]
    latent = torch.randn(21, HEADS, 256, generator=g)
    rope = torch.randn(21, 1, 64, generator=g).expand(-1, HEADS, -1)
    keys, values = torch.cat((latent[..., :128], rope), -1), latent[..., 128:]
    q = torch.randn(8, HEADS, 192, generator=g)
    impl = object.__new__(prefill.FlashMLAPrefillBackend)
    impl.scale = SCALE
    starts = torch.tensor([0, *new]).cumsum(0)
    parts = [slice(0, 8), slice(8, 12), slice(12, 21)]  # of `keys`: new tokens, two chunks
    chunks = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in before]
    context = SimpleNamespace(cu_seq_lens=chunks)
    impl._prefill_metadata = SimpleNamespace(query_start_loc=starts, chunked_context=context)
    states = [impl.run_prefill_new_tokens(q, keys[parts[0]], values[parts[0]], True)]
    states.append(impl.run_prefill_context_chunk(chunk_idx=0, q=q, k=keys[parts[1]], v=values[parts[1]]))
    chunk = SimpleNamespace(query_start_loc=starts, cu_seq_lens=chunks[1])
    into = torch.zeros(8, HEADS, 128, dtype=torch.float64)
    states.append(impl.run_prefill_context_chunk(chunk=chunk, q=q, k=keys[parts[2]], v=values[parts[2]], out=into))
    assert states[2][0] is into and all(lse.shape == (HEADS, 8) for _, lse in states)

    lse = torch.stack([lse.masked_fill(lse == float("inf"), float("-inf")) for _, lse in states])
    weights = torch.softmax(lse, 0).transpose(1, 2).unsqueeze(-1)
    merged = (torch.stack([out for out, _ in states]) * weights).sum(0)
    # Each sequence's keys: its parts of the context, then its own.
    order = [*range(8, 12), *range(12, 14), *range(0, 5), *range(14, 21), *range(5, 8)]
    ends = torch.tensor([0, 11, 21], dtype=torch.int32)
    expected, _ = prefill_by_definition(
        q, keys[order][..., :128], keys[order][:, 0, 128:], values[order], starts.int(), ends, softmax_scale=SCALE, causal=True
    )
    assert (merged - expected).abs().max() < 1e-6
    alone = impl.run_prefill_new_tokens(q, keys[parts[0]], values[parts[0]], False)
    assert torch.equal(alone, states[0][0])
    with pytest.raises(ValueError, match="output_scale is given, expected None"):
        impl.run_prefill_new_tokens(q, keys[parts[0]], values[parts[0]], False, output_scale=torch.ones(1))


def test_prefill_is_for_deepseeks_dimensions_and_hopper(monkeypatch):
    import vllm.v1.attention.backends.mla.prefill.base as base

    cls = prefill.FlashMLAPrefillBackend
    assert cls.supports_mla_dimensions(base.MLADimensions(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128))
    assert not cls.supports_mla_dimensions(base.MLADimensions(qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256))
    assert cls.supports_compute_capability(SimpleNamespace(major=9, minor=0))
    assert not cls.supports_compute_capability(SimpleNamespace(major=10, minor=0))
    with pytest.raises(NotImplementedError, match="dense_prefill runs on Hopper GPUs alone"):
        fm.dense_prefill(
            *(torch.zeros(1, 1, 192), torch.zeros(1, 1, 128), torch.zeros(1, 64), torch.zeros(1, 1, 128)),
            *(torch.tensor([0, 1], dtype=torch.int32),) * 2,
        )


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
