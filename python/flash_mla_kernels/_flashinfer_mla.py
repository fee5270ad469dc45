"""FlashInfer's names for latent attention: part of flash_mla_kernels.flashinfer, which says what holds for all of it."""

from typing import Optional, Tuple, Union

import torch

from ._arrays import count
from ._flashinfer_merge import base_2
from ._interface import get_mla_decoding_metadata
from ._library import dense_decode


class BatchMLAPagedAttentionWrapper:
    """Latent attention of a batch over pages of latents and of rotary keys, decoding and chunks of prompts alike.

    The two caches are best views of one tensor (num_pages, page_size, 576), latents first: then they are read where they lie.
    Caches of their own are put together in every run, which copies them.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Optional[torch.Tensor] = None,
        kv_indptr: Optional[torch.Tensor] = None,
        kv_indices: Optional[torch.Tensor] = None,
        kv_len_arr: Optional[torch.Tensor] = None,
        backend: str = "auto",
    ):
        if use_cuda_graph:
            raise NotImplementedError(
                "use_cuda_graph is True; flash_mla_kernels.flashinfer takes False here (flash_mla_with_kvcache plans inside a graph)"
            )
        self.device = float_workspace_buffer.device
        self._plan = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Union[str, torch.dtype] = "bfloat16",
        kv_data_type: Union[str, torch.dtype] = "bfloat16",
        use_profiler: bool = False,
    ) -> None:
        """Sequence i has the queries qo_indptr[i] to qo_indptr[i + 1] - 1, the pages kv_indices[kv_indptr[i]] and on, and
        kv_len_arr[i] tokens in them. Reads qo_indptr and kv_indptr on the host. Raises ValueError naming the argument."""
        num_heads = count(num_heads, "num_heads")
        queries, pages = _counts(qo_indptr, "qo_indptr"), _counts(kv_indptr, "kv_indptr")
        if len(queries) != len(pages):
            raise ValueError(f"kv_indptr has {len(pages) + 1} elements, expected qo_indptr's {len(queries) + 1}")
        starts, indices = _longs(kv_indptr, self.device), _longs(kv_indices, self.device)
        if indices.numel() < sum(pages):
            raise ValueError(f"kv_indices has {indices.numel()} elements, expected kv_indptr's {sum(pages)}")
        lengths = kv_len_arr.to(device=self.device, dtype=torch.int32).contiguous()
        places = starts[:-1, None] + torch.arange(max(1, *pages), device=self.device)
        indices = torch.nn.functional.pad(indices, (0, 1))  # what lies behind a sequence's pages is not read
        table = indices[places.clamp(max=indices.numel() - 1)].int()
        most = max(1, *queries)
        self._plan = dict(
            table=table,
            lengths=lengths,
            schedule=get_mla_decoding_metadata(lengths, most * num_heads, 1, num_heads),
            rows=None if all(n == most for n in queries) else _rows_at_the_end(queries, most, self.device),
            heads=num_heads,
            widths=(head_dim_ckv, head_dim_kpe),
            page_size=page_size,
            options=dict(softmax_scale=sm_scale, causal=causal, token_rows=True),
            total=sum(queries),
            shape=(len(queries), most),
        )

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        profiler_buffer: Optional[torch.Tensor] = None,
        kv_len: Optional[torch.Tensor] = None,
        page_table: Optional[torch.Tensor] = None,
        **kernel_choices,
    ):
        """q_nope (tokens, heads, 512), already multiplied by W_UK, and q_pe (tokens, heads, 64); ckv_cache (num_pages,
        page_size, 512) and kpe_cache (num_pages, page_size, 64), q's dtype. Returns out (tokens, heads, 512), with
        ``return_lse`` also lse (tokens, heads) float32 in base 2. kv_len and page_table are the plan's."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("run() before plan()")
        for name, x, width in (("q_nope", q_nope, plan["widths"][0]), ("q_pe", q_pe, plan["widths"][1])):
            if tuple(x.shape) != (plan["total"], plan["heads"], width):
                expected = (plan["total"], plan["heads"], width)
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected} as planned")
        for name, x, width in (
            ("ckv_cache", ckv_cache, plan["widths"][0]),
            ("kpe_cache", kpe_cache, plan["widths"][1]),
        ):
            if x.dim() != 3 or tuple(x.shape[1:]) != (plan["page_size"], width):
                expected = f"(num_pages, {plan['page_size']}, {width})"
                raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected} as planned")
        rows, shape = plan["rows"], plan["shape"]
        if plan["total"] == 0:
            parts = (q_nope.new_zeros((*shape, *q_nope.shape[1:])), q_pe.new_zeros((*shape, *q_pe.shape[1:])))
        elif rows is None:
            parts = (q_nope.unflatten(0, shape), q_pe.unflatten(0, shape))
        else:
            parts = (q_nope[rows[0]], q_pe[rows[0]])
        found, statistic = dense_decode(
            *(parts[0], _joined(ckv_cache, kpe_cache).unsqueeze(2), plan["table"], plan["lengths"], plan["widths"][0]),
            *plan["schedule"],
            q_rope=parts[1],
            **plan["options"],
        )
        statistic = statistic.permute(0, 2, 1)
        found, statistic = (x.flatten(0, 1) if rows is None else x[rows[1]] for x in (found, statistic))
        result = found if out is None else out.copy_(found)
        if not return_lse:
            return result
        statistic = base_2(statistic)
        return result, statistic if lse is None else lse.copy_(statistic)


def _counts(indptr: torch.Tensor, name: str) -> list:
    counts = (indptr[1:] - indptr[:-1]).tolist()
    if not counts or min(counts) < 0:
        raise ValueError(f"{name} is {indptr.tolist()}, expected two or more numbers that do not fall")
    return counts


def _longs(x: torch.Tensor, device) -> torch.Tensor:
    return x.to(device=device, dtype=torch.long)


def _rows_at_the_end(queries: list, most: int, device) -> Tuple[torch.Tensor, torch.Tensor]:
    """For sequences of unequally many queries: which query stands in each of ``most`` places of each, the last ones being its
    own (causal masks are aligned at the end), and which places those are."""
    counts = torch.tensor(queries, device=device)
    own = torch.arange(most, device=device) >= most - counts[:, None]
    rows = counts.cumsum(0)[:, None] - most + torch.arange(most, device=device)
    return torch.where(own, rows, 0), own


def _joined(ckv: torch.Tensor, kpe: torch.Tensor) -> torch.Tensor:
    """(num_pages, page_size, 576): a view where the two are halves of one cache."""
    behind = ckv.data_ptr() + ckv.shape[2] * ckv.element_size()
    if ckv.dtype == kpe.dtype and ckv.stride() == kpe.stride() and ckv.stride(2) == 1 and kpe.data_ptr() == behind:
        return ckv.as_strided((*ckv.shape[:2], ckv.shape[2] + kpe.shape[2]), ckv.stride())
    return torch.cat((ckv, kpe), -1)
