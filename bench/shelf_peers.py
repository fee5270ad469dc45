"""What other libraries call the rows of `flash-mla bench --preset h200-shelf`: for a row of its JSON, data and a call of each.

A maker takes a Problem and returns a call, or raises Missing where the library has none for the row. Layouts, workspaces and
plans are made beforehand: only what a layer of a model would launch is in the call. Keys of 192 columns are handed to the peers
whole, so that what they save over broadcasting the rotary part is theirs.
"""

import math

import torch


class Missing(Exception):
    """The peer has nothing for this row, and why."""


def normal(*shape):
    return (torch.randn(shape, device="cuda") / 2).clamp_(-1, 1).bfloat16()


def offsets(count, length):
    return torch.arange(count + 1, dtype=torch.int32, device="cuda") * length


class Attention:
    """q, k, v (tokens, heads, d), and pages of the same keys where the row has them."""

    def __init__(self, row):
        self.row = row
        self.b, self.s_q, self.s_k, self.causal = row["b"], row["s_q"], row["s_k"], row["causal"]
        self.h_q, self.h_kv, self.d_qk, self.d_v = row["h_q"], row["h_kv"], row["d_qk"], row["d_v"]
        self.page = row["page_size"]
        self.q = normal(self.b * self.s_q, self.h_q, self.d_qk)
        self.k = normal(self.b * self.s_k, self.h_kv, self.d_qk)
        self.v = normal(self.b * self.s_k, self.h_kv, self.d_v)
        self.cu_q, self.cu_k = offsets(self.b, self.s_q), offsets(self.b, self.s_k)
        self.lengths = torch.full((self.b,), self.s_k, dtype=torch.int32, device="cuda")

    def pages(self, page):
        """Pools of k and v whose pages are dealt out at random, and the table."""
        count = self.b * self.s_k // page
        table = torch.randperm(count, device="cuda").int()
        pools = []
        for x in (self.k, self.v):
            pool = torch.empty(count, page, *x.shape[1:], dtype=x.dtype, device="cuda")
            pool[table.long()] = x.view(count, page, *x.shape[1:])
            pools.append(pool)
        return *pools, table.view(self.b, -1)

    def wrong(self, out):
        """How far sampled rows are from fp32, over what rounding to bfloat16 allows; at most 1 is right."""
        worst = 0.0
        out = out.reshape(self.b, self.s_q, self.h_q, self.d_v)
        generator = torch.Generator().manual_seed(1)
        for _ in range(16):
            r, i, h = (int(torch.randint(n, (1,), generator=generator)) for n in (self.b, self.s_q, self.h_q))
            seen = self.s_k - self.s_q + i + 1 if self.causal else self.s_k
            keys = slice(r * self.s_k, r * self.s_k + seen)
            g = h // (self.h_q // self.h_kv)
            scores = self.k[keys, g].float() @ self.q[r * self.s_q + i, h].float() / math.sqrt(self.d_qk)
            weights = torch.softmax(scores, 0)
            want = weights @ self.v[keys, g].float()
            room = (weights @ self.v[keys, g].float().abs() + want.abs()) / 128 + 1e-4
            worst = max(worst, ((out[r, i, h].float() - want).abs() / room).max().item())
        return worst


def sdpa(problem, backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415
    from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

    p = problem
    q, k, v = (x.view(p.b, -1, *x.shape[1:]).transpose(1, 2) for x in (p.q, p.k, p.v))
    causal, mask = p.causal and p.s_q > 1, None
    if causal and p.s_q != p.s_k:
        if backend == "CUDNN_ATTENTION":
            raise Missing("torch's causal mask for cuDNN is aligned at the top left")
        causal, mask = False, causal_lower_right(p.s_q, p.s_k)
    kind = getattr(SDPBackend, backend)

    def call():
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=p.h_q != p.h_kv)  # fmt: skip

    return call, lambda out: out.transpose(1, 2)


def flash_attention_3(problem):
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func  # noqa: PLC0415

    p = problem
    out = torch.empty(p.b * p.s_q, p.h_q, p.d_v, dtype=torch.bfloat16, device="cuda")
    common = {"max_seqlen_q": p.s_q, "cu_seqlens_q": p.cu_q, "max_seqlen_k": p.s_k, "causal": p.causal, "fa_version": 3}
    if p.page:
        k, v, table = p.pages(p.page)
        return lambda: flash_attn_varlen_func(p.q, k, v, seqused_k=p.lengths, block_table=table, out=out, **common)
    return lambda: flash_attn_varlen_func(p.q, p.k, p.v, cu_seqlens_k=p.cu_k, out=out, **common)


def workspace():
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def csr_pages(problem, page):
    p = problem
    k, v, table = p.pages(page)
    per_request = p.s_k // page
    last = torch.full((p.b,), page, dtype=torch.int32, device="cuda")
    return (k, v), offsets(p.b, per_request), table.reshape(-1), last


def flashinfer_ragged(problem, backend):
    import flashinfer  # noqa: PLC0415

    p = problem
    if p.page:
        raise Missing("keys are in pages")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(p.cu_q, p.cu_k, p.h_q, p.h_kv, p.d_qk, head_dim_vo=p.d_v, causal=p.causal, q_data_type=torch.bfloat16,
                 kv_data_type=torch.bfloat16)  # fmt: skip
    return lambda: wrapper.run(p.q, p.k, p.v)


def flashinfer_paged(problem, backend):
    import flashinfer  # noqa: PLC0415

    p = problem
    if p.d_qk != p.d_v or p.s_q == 1:
        raise Missing("of one head dimension, and not decode")
    page = p.page or 64
    pool, indptr, indices, last = csr_pages(p, page)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(p.cu_q, indptr, indices, last, p.h_q, p.h_kv, p.d_qk, page, causal=p.causal,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
    return lambda: wrapper.run(p.q, pool)


def flashinfer_decode(problem, tensor_cores):
    import flashinfer  # noqa: PLC0415

    p = problem
    if p.s_q != 1 or not p.page:
        raise Missing("one query token over pages")
    pool, indptr, indices, last = csr_pages(p, p.page)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(indptr, indices, last, p.h_q, p.h_kv, p.d_qk, p.page, q_data_type=torch.bfloat16,
                 kv_data_type=torch.bfloat16)  # fmt: skip
    return lambda: wrapper.run(p.q, pool)


ATTENTION = {
    "torch cuDNN": lambda p: sdpa(p, "CUDNN_ATTENTION"),
    "torch flash": lambda p: sdpa(p, "FLASH_ATTENTION"),
    "FlashAttention-3": flash_attention_3,
    "FlashInfer fa3": lambda p: (flashinfer_paged if p.page else flashinfer_ragged)(p, "fa3"),
    "FlashInfer fa2, pages": lambda p: flashinfer_paged(p, "fa2"),
    "FlashInfer decode": lambda p: flashinfer_decode(p, False),
    "FlashInfer decode, tensor cores": lambda p: flashinfer_decode(p, True),
}


class Tokens:
    """New tokens of up to 32 requests behind a prefix of 100, in pages of 64."""

    def __init__(self, n):
        self.n = n
        requests, prefix, page = min(n, 32), 100, 64
        each = -(-n // requests)
        per_request = -(-(prefix + each) // page)
        token = torch.arange(n, device="cuda")
        self.count, self.batch, self.positions = requests * per_request, token // each, prefix + token % each
        self.table = torch.randperm(self.count, device="cuda")
        self.slots = self.table[self.batch * per_request + self.positions // page] * page + self.positions % page
        self.indptr, self.last = offsets(requests, per_request), torch.full((requests,), (prefix + each - 1) % page + 1, device="cuda").int()
        self.ints = [x.int() for x in (self.batch, self.positions)]


def append_pages(row):
    n, h, d = row["tokens"], row["h_kv"], row["d"]
    t, key, value = Tokens(n), normal(n, h, d), normal(n, h, d)
    k, v = (torch.zeros(t.count, 64, h, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def right():
        return torch.equal(k.view(-1, h, d)[t.slots], key) and torch.equal(v.view(-1, h, d)[t.slots], value)

    def flashinfer_call():
        import flashinfer  # noqa: PLC0415

        indices = t.table.int()
        return lambda: flashinfer.append_paged_kv_cache(key, value, *t.ints, (k, v), indices, t.indptr, t.last)

    def torch_call():
        def call():
            k.view(-1, h, d)[t.slots] = key
            v.view(-1, h, d)[t.slots] = value

        return call

    def reset():
        k.zero_()
        v.zero_()

    return {"FlashInfer": flashinfer_call, "torch": torch_call}, right, reset


def append_latents(row):
    n = row["tokens"]
    t, latents = Tokens(n), normal(n, 576)
    ckv, kpe = latents[:, :512].contiguous(), latents[:, 512:].contiguous()
    cache = torch.zeros(t.count, 64, 576, dtype=torch.bfloat16, device="cuda")
    parts = [torch.zeros(t.count, 64, w, dtype=torch.bfloat16, device="cuda") for w in (512, 64)]

    def right():
        whole = cache.view(-1, 576)[t.slots]
        if whole.count_nonzero() == 0:
            whole = torch.cat([x.view(-1, x.shape[-1])[t.slots] for x in parts], 1)
        return torch.equal(whole, latents)

    def flashinfer_call():
        import flashinfer  # noqa: PLC0415

        indices = t.table.int()
        return lambda: flashinfer.append_paged_mla_kv_cache(ckv, kpe, *t.ints, *parts, indices, t.indptr, t.last)

    def torch_call():
        def call():
            cache.view(-1, 576)[t.slots] = latents

        return call

    return {"FlashInfer": flashinfer_call, "torch": torch_call}, right


def norm(row, add):
    n, d = row["tokens"], row["d"]
    x, residual, weight = normal(n, d), normal(n, d), normal(d)
    functional = torch.nn.functional
    before = [t.float() for t in (x, residual)]
    want = functional.rms_norm((before[0] + before[1]).bfloat16().float() if add else before[0], (d,), weight.float(), 1e-6)
    out = torch.empty_like(x)

    def right():
        return bool(((out.float() - want).abs() <= want.abs() / 64 + 1e-3).all())

    def flashinfer_call():
        import flashinfer  # noqa: PLC0415

        if not add:
            return lambda: flashinfer.rmsnorm(x, weight, out=out)
        copy = x.clone()

        def call():
            flashinfer.fused_add_rmsnorm(copy, residual, weight)  # in place

        call.finish = lambda: out.copy_(copy)
        return call

    def torch_call():
        def call():
            call.last = functional.rms_norm(residual.add_(x) if add else x, (d,), weight, 1e-6)

        call.finish = lambda: out.copy_(call.last)
        return call

    def reset():
        residual.copy_(before[1])

    return {"FlashInfer": flashinfer_call, "torch": torch_call}, right, reset


def rope(row):
    n, h, d = row["tokens"], row["h_q"], row["d"]
    x, positions = normal(n, h, d), torch.arange(n, dtype=torch.int32, device="cuda")
    before = x.clone()
    angle = positions[:, None].float() * (10000.0 ** (-torch.arange(0, d, 2, device="cuda").double() / d)).float()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = before.float().chunk(2, -1)
    want = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def right():
        return bool(((x.float() - want).abs() <= want.abs() / 64 + 1e-2).all())

    def flashinfer_call():
        import flashinfer  # noqa: PLC0415

        split = h - h // 5  # queries and keys, as in a model with a group of 4
        return lambda: flashinfer.apply_rope_pos_ids_inplace(x[:, :split], x[:, split:], positions)

    def torch_call():
        cosines, sines = cos.bfloat16(), sin.bfloat16()

        def call():
            left, right_half = x.chunk(2, -1)
            x.copy_(torch.cat([left * cosines - right_half * sines, right_half * cosines + left * sines], -1))

        return call

    return {"FlashInfer": flashinfer_call, "torch": torch_call}, right, lambda: x.copy_(before)


def routing(row):
    n, experts, k = row["tokens"], row["d"], row["topk"]
    logits, bias = torch.randn(n, experts, device="cuda"), torch.randn(experts, device="cuda") / 8
    ids = torch.zeros(n, k, dtype=torch.int32, device="cuda")
    weights = torch.zeros(n, k, device="cuda")

    def plain():
        scores = logits.sigmoid()
        biased = scores + bias
        groups = biased.view(n, 8, -1).topk(2, -1)[0].sum(-1).topk(4, -1)[1]
        kept = torch.zeros(n, 8, device="cuda", dtype=torch.bool).scatter_(1, groups, True)
        chosen = biased.masked_fill(~kept.repeat_interleave(experts // 8, 1), -math.inf).topk(k, -1)[1]
        w = scores.gather(1, chosen)
        return chosen, w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5

    expected = plain()[0].sort(-1)[0]

    def right():
        return torch.equal(ids.long().sort(-1)[0], expected)

    def flashinfer_call():
        from flashinfer.fused_moe import fused_topk_deepseek  # noqa: PLC0415

        return lambda: fused_topk_deepseek(logits, bias, 8, 4, k, 2.5, weights, ids)

    def torch_call():
        def call():
            call.last = plain()

        call.finish = lambda: ids.copy_(call.last[0])
        return call

    return {"FlashInfer": flashinfer_call, "torch": torch_call}, right


ROWS = {
    "append_pages": append_pages,
    "append_kv": append_latents,
    "rms_norm": lambda row: norm(row, False),
    "add_rms_norm": lambda row: norm(row, True),
    "apply_rope": rope,
    "choose_experts": routing,
}
