"""FlashInfer's names for attention over keys and values of their own: part of flash_mla_kernels.flashinfer, which says what
holds for all of it."""

import math
from typing import Optional, Sequence, Tuple, Union

import torch

from ._flashinfer_merge import base_2
from ._flashinfer_pages import get_seq_lens, pools, tokens_first
from ._gqa import gqa_attention, gqa_schedule


def refuse(**given) -> None:
    """Arguments with an effect that is not there."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, (int, float)) and value == 1):
            raise NotImplementedError(f"{name} is {value!r}; flash_mla_kernels.flashinfer takes none")


def _alibi_slopes(mode: str, heads: int, aligned: bool, device) -> Optional[torch.Tensor]:
    if mode == "NONE":
        return None
    if mode != "ALIBI":
        raise NotImplementedError(f"pos_encoding_mode is {mode!r}; flash_mla_kernels.flashinfer takes NONE and ALIBI")
    if not aligned:
        raise NotImplementedError(
            "pos_encoding_mode is 'ALIBI' without causal; flash_mla_kernels.flashinfer takes it with it"
        )
    n = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)] + [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def ints(x: torch.Tensor, device) -> torch.Tensor:
    return x.to(device=device, dtype=torch.int32).contiguous()


def _pack_mask(mask: torch.Tensor, counts: Sequence[int], device) -> Tuple[torch.Tensor, torch.Tensor]:
    """A bit for each element, every sequence's ``counts[i]`` from a byte of their own on, and where those begin."""
    if mask.numel() != sum(counts):
        raise ValueError(
            f"custom_mask has {mask.numel()} elements, expected {sum(counts)}: queries times keys of all sequences"
        )
    packed, starts = [], [0]
    bits = 2 ** torch.arange(8, dtype=torch.int32, device=mask.device)
    for part in mask.flatten().bool().split(list(counts)):
        whole = torch.nn.functional.pad(part.int(), (0, -part.numel() % 8)).view(-1, 8)
        packed.append((whole * bits).sum(1).to(torch.uint8))
        starts.append(starts[-1] + packed[-1].numel())
    return torch.cat(packed).to(device), torch.tensor(starts, dtype=torch.int32, device=device)


class Wrapper:
    """What the wrappers share: a plan's tensors, which stay where they are when a CUDA graph is to find them again."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False):
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f'kv_layout is {kv_layout!r}, expected "NHD" or "HND"')
        self.device = float_workspace_buffer.device
        self._layout, self._keeps, self._kept = kv_layout, use_cuda_graph, {}
        self._tensors, self._options, self._heads = None, {}, 0

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._keeps

    def _set(self, heads: int, tensors: dict, options: dict) -> None:
        if self._keeps:
            for name, value in tensors.items():
                kept = self._kept.get(name)
                if value is None or kept is None:
                    self._kept[name] = value
                elif kept.dtype != value.dtype or kept.numel() < value.numel():
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)}, more than the {tuple(kept.shape)} of the first plan"
                    )
                elif kept.shape == value.shape:
                    tensors[name] = kept.copy_(value)
                else:
                    kept[: value.numel()].copy_(value)
                    tensors[name] = kept
        self._heads, self._tensors, self._options = heads, tensors, options

    def _attend(self, q, k, v, out=None, window_left=None, sinks=None):
        """gqa_attention as planned: out, and lse as the library has it."""
        if self._tensors is None:
            raise RuntimeError("plan() has not been called")
        if q.shape[1] != self._heads:
            raise ValueError(f"q has {q.shape[1]} heads, expected {self._heads} as in plan()")
        options = dict(self._options, sinks=sinks)
        if window_left is not None:
            options["window"] = (window_left, -1)
        tensors = dict(self._tensors)
        parts, splits = tensors.pop("parts", None), tensors.pop("num_splits", None)
        return gqa_attention(
            q, k, v, out=out, schedule=None if parts is None else (parts, splits), **tensors, **options
        )

    def _run(self, q, k, v, out, lse, return_lse, window_left=None, sinks=None):
        result, sums = self._attend(q, k, v, out, window_left, sinks)
        if not return_lse:
            return result
        sums = base_2(sums.t())
        return result, sums if lse is None else lse.copy_(sums)

    def run_return_lse(self, *tensors, **options):
        return self.run(*tensors, return_lse=True, **options)

    forward_return_lse = run_return_lse

    def end_forward(self) -> None:
        """Has no effect, as in FlashInfer."""


def _pages(indptr, indices, last_page_len, page_size, device) -> dict:
    indptr = ints(indptr, device)
    return dict(
        page_indptr=indptr,
        page_indices=ints(indices, device),
        seqlens_k=get_seq_lens(indptr, ints(last_page_len, device), page_size),
    )


def options_of(sm_scale, window_left, logits_soft_cap, slopes, causal=False) -> dict:
    return dict(
        softmax_scale=sm_scale,
        window=(window_left, -1),
        soft_cap=logits_soft_cap or 0.0,
        alibi_slopes=slopes,
        causal=causal,
    )


class _PagedRun:
    """run() of the wrappers over a paged cache."""

    def attend(self, q: torch.Tensor, paged_kv_cache) -> Tuple[torch.Tensor, torch.Tensor]:
        """run() with lse as the library has it, (heads, tokens) in base e: what a cascade merges."""
        return self._attend(q, *pools(paged_kv_cache, self._layout))

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache,
        *args,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        window_left: Optional[int] = None,
        sinks: Optional[torch.Tensor] = None,
    ):
        """q (tokens, heads, head_dim) to out, or (out, lse)."""
        refuse(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, args=args or None)
        return self._run(q, *pools(paged_kv_cache, self._layout), out, lse, return_lse, window_left, sinks)


class BatchDecodeWithPagedKVCacheWrapper(_PagedRun, Wrapper):
    """Decoding over a paged cache: plan() once a step, run() once a layer."""

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, **buffers
    ):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        q_data_type=None,
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
        block_tables: Optional[torch.Tensor] = None,
        seq_lens: Optional[torch.Tensor] = None,
        fixed_split_size: Optional[int] = None,
        disable_split_kv: bool = False,
    ) -> None:
        """fixed_split_size counts pages; a split has as many keys, rounded up to blocks of 64."""
        tensors = _pages(indptr, indices, last_page_len, page_size, self.device)
        blocks = 0 if fixed_split_size is None else -(-fixed_split_size * page_size // 64)
        if not disable_split_kv:
            tensors["parts"], tensors["num_splits"] = gqa_schedule(
                tensors["seqlens_k"], num_qo_heads, num_kv_heads, head_dim, fixed_split_blocks=blocks
            )
        slopes = _alibi_slopes(pos_encoding_mode, num_qo_heads, True, self.device)
        options = options_of(sm_scale, window_left, logits_soft_cap, slopes)
        self._set(num_qo_heads, tensors, dict(options, fixed_split_blocks=blocks))

    begin_forward = plan


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The same, whose plans stay where a CUDA graph finds them. The buffers are taken and not needed."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ):
        super().__init__(workspace_buffer, kv_layout, use_cuda_graph=True)


class _PrefillWrapper(Wrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, **buffers):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)

    def _plan(self, qo_indptr, tensors, heads, options, custom_mask, packed_custom_mask, causal, mode, lengths):
        starts = qo_indptr.cpu().tolist()
        queries = [b - a for a, b in zip(starts, starts[1:])]
        tensors["cu_seqlens_q"] = ints(qo_indptr, self.device)
        if packed_custom_mask is not None or custom_mask is not None:
            causal = False  # FlashInfer's rule
            counts = [n * m for n, m in zip(queries, lengths().cpu().tolist())]
            if packed_custom_mask is not None:
                ends = torch.tensor([0] + [-(-n // 8) for n in counts]).cumsum(0)
                tensors["mask"], tensors["mask_indptr"] = packed_custom_mask.to(self.device), ints(ends, self.device)
            else:
                tensors["mask"], tensors["mask_indptr"] = _pack_mask(custom_mask, counts, self.device)
        slopes = _alibi_slopes(mode, heads, causal, self.device)
        self._set(heads, tensors, dict(options(slopes, causal), max_seqlen_q=max(queries, default=0)))


class BatchPrefillWithPagedKVCacheWrapper(_PagedRun, _PrefillWrapper):
    """Prompts and chunks of prompts over a paged cache, decoding sequences among them if need be."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type=None,
        kv_data_type=None,
        **tuning,
    ) -> None:
        tensors = _pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, self.device)
        self._plan(
            qo_indptr,
            tensors,
            num_qo_heads,
            lambda slopes, seen: options_of(sm_scale, window_left, logits_soft_cap, slopes, seen),
            custom_mask,
            packed_custom_mask,
            causal,
            pos_encoding_mode,
            lambda: tensors["seqlens_k"],
        )

    begin_forward = plan


class BatchPrefillWithRaggedKVCacheWrapper(_PrefillWrapper):
    """Prompts whose keys and values lie end to end."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type=None,
        kv_data_type=None,
        **tuning,
    ) -> None:
        self._plan(
            qo_indptr,
            dict(cu_seqlens_k=ints(kv_indptr, self.device)),
            num_qo_heads,
            lambda slopes, seen: options_of(sm_scale, window_left, logits_soft_cap, slopes, seen),
            custom_mask,
            packed_custom_mask,
            causal,
            pos_encoding_mode,
            lambda: kv_indptr[1:] - kv_indptr[:-1],
        )

    begin_forward = plan

    def run(self, q, k, v, *args, out=None, lse=None, return_lse=False, enable_pdl=None, sinks=None):
        """q (tokens, heads, d), k, v (tokens, kv heads, d), in HND order (kv heads, tokens, d), to out or (out, lse)."""
        refuse(args=args or None)
        k, v = tokens_first(k, self._layout, 1), tokens_first(v, self._layout, 1)
        return self._run(q, k, v, out, lse, return_lse, sinks=sinks)


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Optional[float] = None,
    k_scale: Optional[float] = None,
    v_scale: Optional[float] = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    sm_scale: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    return_lse: bool = False,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """q (heads, d), k and v (tokens, kv heads, d), to out (heads, d), or with lse (heads,)."""
    refuse(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    k, v = (tokens_first(x, kv_layout, 1).unsqueeze(0) for x in (k, v))
    slopes = _alibi_slopes(pos_encoding_mode, q.shape[0], True, q.device)
    seqlens = torch.full((1,), k.shape[1], dtype=torch.int32, device=q.device)
    out, lse = gqa_attention(
        q.unsqueeze(0),
        k,
        v,
        seqlens_k=seqlens,
        schedule=gqa_schedule(seqlens, q.shape[0], k.shape[2], q.shape[1]),
        **options_of(sm_scale, window_left, logits_soft_cap, slopes),
    )
    return (out[0], base_2(lse.t())[0]) if return_lse else out[0]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q=None,
    scale_k=None,
    scale_v=None,
    o_dtype=None,
    custom_mask: Optional[torch.Tensor] = None,
    packed_custom_mask: Optional[torch.Tensor] = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: Optional[float] = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
    """q (tokens, heads, d), k and v (tokens, kv heads, d), to out, or with lse (tokens, heads)."""
    refuse(scale_q=scale_q, scale_k=scale_k, scale_v=scale_v)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(q, kv_layout)
    tokens = k.shape[0] if kv_layout == "NHD" else k.shape[1]
    starts = [torch.tensor([0, n], dtype=torch.int32) for n in (q.shape[0], tokens)]
    wrapper.plan(
        *starts,
        q.shape[1],
        k.shape[1 if kv_layout == "NHD" else 0],
        q.shape[2],
        custom_mask=custom_mask,
        packed_custom_mask=packed_custom_mask,
        causal=causal,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
    )
    return wrapper.run(q, k, v, return_lse=return_lse)
