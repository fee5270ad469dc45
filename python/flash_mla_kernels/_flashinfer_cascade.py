"""FlashInfer's names for attention over shared prefixes: part of flash_mla_kernels.flashinfer, which says what holds for all of
it."""

from typing import List, Optional

import torch

from ._flashinfer_attention import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    single_prefill_with_kv_cache,
)
from ._flashinfer_merge import merge_state, merge_state_in_place, merge_states
from ._pages import merge_states_in_place

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


class MultiLevelCascadeAttentionWrapper:
    """Attention over levels of pages, of which the first ones are shared by several sequences: each level by itself, merged.

    The last level is causal where plan() says so, the others are seen whole.
    """

    def __init__(self, num_levels: int, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, **buffers):
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph)
            for _ in range(num_levels)
        ]

    def plan(
        self,
        qo_indptr_arr: List[torch.Tensor],
        paged_kv_indptr_arr: List[torch.Tensor],
        paged_kv_indices_arr: List[torch.Tensor],
        paged_kv_last_page_len: List[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        if pos_encoding_mode != "NONE" or window_left >= 0:
            raise NotImplementedError(
                "pos_encoding_mode and window_left of MultiLevelCascadeAttentionWrapper: positions differ by level"
            )
        arrays = zip(self._levels, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for level, (wrapper, *tables) in enumerate(arrays):
            wrapper.plan(
                *tables,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and level + 1 == len(self._levels),
                sm_scale=sm_scale,
                logits_soft_cap=logits_soft_cap,
            )

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache) -> torch.Tensor:
        out, lse = self._levels[-1].attend(q, paged_kv_cache)
        for wrapper in self._levels[:-1]:
            level, level_lse = wrapper.attend(q, paged_kv_cache)
            merge_states_in_place(out[None], lse[None], level[None], level_lse[None])
        return out

    forward = run


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decoding of sequences that share a prefix, which lies end to end, over pages of what each has of its own."""

    _wrapper_type = BatchDecodeWithPagedKVCacheWrapper

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"):
        self._wrapper = self._wrapper_type(float_workspace_buffer, kv_layout)
        self._layout = kv_layout

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: str = "float16",
    ) -> None:
        tables = (unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len)
        self._wrapper.plan(*tables, num_qo_heads, num_kv_heads, head_dim, page_size)

    def forward(self, q, k_shared, v_shared, unique_kv_cache) -> torch.Tensor:
        """q (tokens, heads, d), k_shared and v_shared (tokens of the prefix, kv heads, d), in HND order (kv heads, tokens, d)."""
        return self._merged(q, k_shared, v_shared, unique_kv_cache, None)

    def _merged(self, q, k_shared, v_shared, unique_kv_cache, sm_scale) -> torch.Tensor:
        out, lse = single_prefill_with_kv_cache(
            q, k_shared, v_shared, kv_layout=self._layout, sm_scale=sm_scale, return_lse=True
        )
        merge_state_in_place(out, lse, *self._wrapper.run_return_lse(q, unique_kv_cache))
        return out

    def end_forward(self) -> None:
        """Has no effect, as in FlashInfer."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(BatchDecodeWithSharedPrefixPagedKVCacheWrapper):
    """The same for prompts, or chunks of prompts, behind a shared prefix, which all their queries see."""

    _wrapper_type = BatchPrefillWithPagedKVCacheWrapper

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        self._plan = (
            *(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            *(num_qo_heads, num_kv_heads, head_dim, page_size),
        )

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """As above; ``causal`` is about what each sequence has of its own."""
        self._wrapper.plan(*self._plan, causal=causal, sm_scale=sm_scale)
        return self._merged(q, k_shared, v_shared, unique_kv_cache, sm_scale)
