"""FlashInfer's names for decoding sequences and prompts in one batch: part of flash_mla_kernels.flashinfer, which says what
holds for all of it."""

from typing import Optional, Tuple

import torch

from ._flashinfer_attention import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    Wrapper,
    ints,
    options_of,
    refuse,
    single_prefill_with_kv_cache,
)
from ._flashinfer_pages import get_seq_lens, pools
from ._gqa import gqa_schedule

# Queries up to which a sequence counts as decoding: drafts are queries too.
_FEW_QUERIES = 16


class BatchAttention(Wrapper):
    """Decoding sequences, prompts and chunks of prompts over a paged cache: one plan a step, one call a layer.

    The sequences that a batch begins with, as long as they have 16 queries at most, are cut into parts of equal work; what follows
    is worked on as a whole. So decoding sequences belong first.
    """

    def __init__(self, kv_layout: str = "NHD", device: str = "cuda"):
        super().__init__(torch.empty(0, dtype=torch.uint8, device=device), kv_layout)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: Optional[float] = None,
        logits_soft_cap: Optional[float] = None,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Sequence i has the queries qo_indptr[i] to qo_indptr[i + 1] - 1, the pages kv_indices[kv_indptr[i]] and on, and
        kv_len_arr[i] tokens in them. Reads qo_indptr on the host."""
        starts = qo_indptr.tolist()
        queries = [b - a for a, b in zip(starts, starts[1:])]
        decoding = next((i for i, n in enumerate(queries) if n > _FEW_QUERIES), len(queries))
        few = max(queries[:decoding], default=0)
        tensors = dict(
            cu_seqlens_q=ints(qo_indptr, self.device),
            page_indptr=ints(kv_indptr, self.device),
            page_indices=ints(kv_indices, self.device),
            seqlens_k=ints(kv_len_arr, self.device),
        )
        if few > 0:
            tensors["parts"], tensors["num_splits"] = gqa_schedule(
                tensors["seqlens_k"][:decoding], num_qo_heads, num_kv_heads, head_dim_qk, max_seqlen_q=few
            )
        options = dict(
            options_of(sm_scale, -1, logits_soft_cap, None, causal),
            max_seqlen_q=max(queries, default=0),
            num_scheduled=decoding if few > 0 else -1,
            max_scheduled_q=few,
        )
        self._set(num_qo_heads, tensors, options)

    def run(
        self,
        q: torch.Tensor,
        kv_cache,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        k_scale: Optional[torch.Tensor] = None,
        v_scale: Optional[torch.Tensor] = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: Optional[torch.Tensor] = None,
        kv_cache_sf=None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """q (tokens, heads, d) to out and lse. logits_soft_cap is the plan's."""
        refuse(k_scale=k_scale, v_scale=v_scale, kv_cache_sf=kv_cache_sf)
        if logits_soft_cap and logits_soft_cap != self._options.get("soft_cap"):
            raise ValueError(
                f"logits_soft_cap is {logits_soft_cap}, expected {self._options.get('soft_cap')} as in plan()"
            )
        return self._run(q, *pools(kv_cache, self._layout), out, lse, True)


class PODWithPagedKVCacheWrapper:
    """A prompt whose keys and values lie end to end, beside decoding sequences over pages."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, *buffers, **more_buffers):
        self._decode = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._decode.is_cuda_graph_enabled

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
        q_data_type="float16",
        kv_data_type=None,
        data_type=None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
    ) -> None:
        """Of the decoding sequences."""
        tables = (indptr, indices, last_page_len)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._sm_scale, self._window_left = sm_scale, window_left
        self._decode.plan(*tables, *shape, pos_encoding_mode, window_left, sm_scale=sm_scale)

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d,
        custom_mask_p: Optional[torch.Tensor] = None,
        packed_custom_mask_p: Optional[torch.Tensor] = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: Optional[float] = None,
        window_left_p: int = -1,
        rope_scale_p: Optional[float] = None,
        rope_theta_p: Optional[float] = None,
        return_lse_p: bool = False,
        custom_mask_d: Optional[torch.Tensor] = None,
        packed_custom_mask_d: Optional[torch.Tensor] = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: Optional[float] = None,
        window_left_d: int = -1,
        rope_scale_d: Optional[float] = None,
        rope_theta_d: Optional[float] = None,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: Optional[bool] = None,
        *args,
    ):
        """(the prompt's out, the decoding sequences'), each with its lse behind it where asked for. Scale, window and layout of
        the decoding sequences are the plan's and the wrapper's: ``sm_scale_d`` and ``window_left_d`` may only repeat them."""
        refuse(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, args=args or None)
        refuse(custom_mask_d=custom_mask_d, packed_custom_mask_d=packed_custom_mask_d)
        if sm_scale_d is not None and sm_scale_d != self._sm_scale:
            raise ValueError(f"sm_scale_d is {sm_scale_d}, expected {self._sm_scale} as in plan()")
        if window_left_d >= 0 and window_left_d != self._window_left:
            raise ValueError(f"window_left_d is {window_left_d}, expected {self._window_left} as in plan()")
        prompt = single_prefill_with_kv_cache(
            *(q_p, k_p, v_p),
            custom_mask=custom_mask_p,
            packed_custom_mask=packed_custom_mask_p,
            causal=causal_p,
            kv_layout=kv_layout_p,
            pos_encoding_mode=pos_encoding_mode_p,
            sm_scale=sm_scale_p,
            window_left=window_left_p,
            return_lse=return_lse_p,
        )
        return prompt, self._decode.run(q_d, paged_kv_cache_d, return_lse=return_lse_d)


class BatchPODWithPagedKVCacheWrapper:
    """Prompts, or chunks of prompts, and decoding sequences, each over pages."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"):
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._decode = BatchAttention(kv_layout, float_workspace_buffer.device)
        self._plan_p = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type="float16",
        kv_data_type=None,
        data_type=None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
    ) -> None:
        if pos_encoding_mode != "NONE" or window_left >= 0:
            raise NotImplementedError(
                "pos_encoding_mode and window_left of BatchPODWithPagedKVCacheWrapper; flash_mla_kernels.flashinfer takes none"
            )
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan_p = ((qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p, *shape), sm_scale)
        lengths = get_seq_lens(kv_indptr_d, last_page_len_d, page_size)
        self._decode.plan(
            *(qo_indptr_d, kv_indptr_d, kv_indices_d, lengths, num_qo_heads, num_kv_heads, head_dim, head_dim, page_size),
            sm_scale=sm_scale,
        )

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p,
        q_d: torch.Tensor,
        paged_kv_cache_d,
        custom_mask_p: Optional[torch.Tensor] = None,
        packed_custom_mask_p: Optional[torch.Tensor] = None,
        causal_p: bool = False,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: Optional[bool] = None,
    ):
        """(the prompts' out, the decoding sequences'), with ``return_lse`` each as (out, lse)."""
        refuse(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        if self._plan_p is None:
            raise RuntimeError("plan() has not been called")
        tables, sm_scale = self._plan_p
        masks = dict(custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p)
        self._prefill.plan(*tables, causal=causal_p, sm_scale=sm_scale, **masks)
        prompts = self._prefill.run(q_p, paged_kv_cache_p, return_lse=return_lse)
        decodes = self._decode.run(q_d, paged_kv_cache_d)
        return prompts, decodes if return_lse else decodes[0]
