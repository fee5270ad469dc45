"""FlashInfer's names for pages: part of flash_mla_kernels.flashinfer, which says what holds for all of it.

The library's own calls: on the CPU they check every number, on a GPU nothing synchronises.
"""

from typing import Optional, Tuple

import torch

from ._pages import append_pages, batch_positions, paged_seqlens


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each sequence; 0 of one without pages."""
    return paged_seqlens(kv_indptr, kv_last_page_len, page_size)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: Optional[torch.Tensor] = None,
    positions: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sequence and position of each of nnz tokens, those of sequence i being its last ones: both int32 (nnz,)."""
    device = append_indptr.device
    sequences, places = (
        torch.empty(nnz, dtype=torch.int32, device=device) if x is None else x for x in (batch_indices, positions)
    )
    return batch_positions(append_indptr, seq_lens.to(device), nnz, out=(sequences, places))


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Writes keys and values (tokens, kv heads, d) to their places in the pages."""
    caches = pools(paged_kv_cache, kv_layout)
    append_pages(append_key, append_value, batch_indices, positions, kv_indptr, kv_indices, *caches)


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: Optional[torch.Tensor],
    kpe_cache: Optional[torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Writes latents (tokens, 512) and rotary keys (tokens, 64) to their places in the pages; a cache that is None is left out."""
    for rows, pool in ((append_ckv, ckv_cache), (append_kpe, kpe_cache)):
        if pool is None:
            continue
        heads = (rows.unsqueeze(1), None)
        append_pages(*heads, batch_indices, positions, kv_indptr, kv_indices, pool.unsqueeze(2))


def pools(paged_kv_cache, layout: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """(num_pages, page_size, heads, d) of keys and of values."""
    if isinstance(paged_kv_cache, torch.Tensor):
        if paged_kv_cache.dim() != 5 or paged_kv_cache.shape[1] != 2:
            raise ValueError(
                f"paged_kv_cache has shape {tuple(paged_kv_cache.shape)}, expected two tensors or (num_pages, 2, ...)"
            )
        paged_kv_cache = paged_kv_cache.unbind(1)
    k, v = paged_kv_cache
    return tokens_first(k, layout, 2), tokens_first(v, layout, 2)


def tokens_first(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """The view with tokens before heads, whose dimension is ``heads`` in NHD order."""
    if layout not in ("NHD", "HND"):
        raise ValueError(f'kv_layout is {layout!r}, expected "NHD" or "HND"')
    return x if layout == "NHD" else x.transpose(heads - 1, heads)
