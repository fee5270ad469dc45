"""Random problems over a paged cache, and an oracle in torch; a server for each format of calls."""

from dataclasses import dataclass, field
from typing import Optional

import pytest
import torch
from call_service import TEMPLATES, Service


@dataclass
class Problem:
    lengths: list
    s_q: int = 1
    h_q: int = 4
    h_kv: int = 1
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    d_qk: int = 576
    d_v: int = 512
    causal: bool = False
    softmax_scale: Optional[float] = None
    seed: int = 0
    q: torch.Tensor = field(init=False)
    k_cache: torch.Tensor = field(init=False)
    block_table: torch.Tensor = field(init=False)
    cache_seqlens: torch.Tensor = field(init=False)

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return (torch.randn(*shape, generator=g) / 10).clamp(-1, 1).to(self.dtype)

        b = len(self.lengths)
        pages = [-(-n // self.page_size) for n in self.lengths]
        total, width = sum(pages) + 3, max(pages, default=0) + 2
        self.q = draw(b, self.s_q, self.h_q, self.d_qk)
        self.k_cache = draw(total, self.page_size, self.h_kv, self.d_qk)
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        # Unused entries hold what must never be followed, unused slots what must never be read.
        self.block_table = torch.full((b, width), 2147480000, dtype=torch.int32)
        self.block_table[:, 1::2] = -1
        order = torch.randperm(total, generator=g)
        used = torch.zeros(total, self.page_size, dtype=torch.bool)
        at = 0
        for i, n in enumerate(self.lengths):
            mine = order[at : at + pages[i]]
            at += pages[i]
            self.block_table[i, : pages[i]] = mine.to(torch.int32)
            for j, page in enumerate(mine.tolist()):
                used[page, : max(0, min(self.page_size, n - j * self.page_size))] = True
        self.k_cache[~used] = float("nan")

    def keys(self, i):
        """Keys of request i, (length, h_kv, d_qk) float64."""
        n = self.lengths[i]
        pages = self.block_table[i, : -(-n // self.page_size)].long()
        return self.k_cache[pages].reshape(-1, self.h_kv, self.d_qk)[:n].double()

    def visible(self, i):
        """(s_q, length) bool."""
        n = self.lengths[i]
        keys = torch.arange(n)
        if not self.causal or self.s_q == 1:
            return torch.ones(self.s_q, n, dtype=torch.bool)
        return keys[None, :] <= n - self.s_q + torch.arange(self.s_q)[:, None]

    def expected(self):
        scale = self.softmax_scale if self.softmax_scale is not None else self.d_qk**-0.5
        out = torch.zeros(len(self.lengths), self.s_q, self.h_q, self.d_v, dtype=torch.float64)
        lse = torch.full((len(self.lengths), self.h_q, self.s_q), float("inf"), dtype=torch.float64)
        for i in range(len(self.lengths)):
            k = self.keys(i).repeat_interleave(self.h_q // self.h_kv, dim=1)
            s = torch.einsum("shd,khd->hsk", self.q[i].double(), k) * scale
            s = s.masked_fill(~self.visible(i)[None], float("-inf"))
            lse_i = torch.logsumexp(s, dim=-1)
            p = torch.exp(s - torch.where(lse_i == float("-inf"), 0.0, lse_i)[..., None])
            out[i] = torch.einsum("hsk,khd->shd", p, k[..., : self.d_v])
            lse[i] = torch.where(lse_i == float("-inf"), float("inf"), lse_i)
        return out, lse

    def args(self):
        return self.q, self.k_cache, self.block_table, self.cache_seqlens, self.d_v


def assert_close(out, lse, expected_out, expected_lse, dtype):
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == expected_out.shape and lse.shape == expected_lse.shape
    out, lse = out.double(), lse.double()
    assert torch.isfinite(out).all()
    absolute, relative = (8e-4, 2.01 / 128) if dtype != torch.float32 else (2e-6, 1e-5)
    error = (out - expected_out).abs()
    assert ((error <= absolute) | (error <= relative * expected_out.abs())).all(), f"largest error {error.max()}"
    norm = (out * out + expected_out * expected_out).sum()
    if norm > 0:
        assert 1 - 2 * (out * expected_out).sum() / norm < 5e-6
    assert torch.equal(torch.isinf(lse), torch.isinf(expected_lse))
    finite = torch.isfinite(expected_lse)
    error = (lse - expected_lse).abs()[finite]
    assert ((error <= 1e-6) | (error <= 8.01 / 65536 * expected_lse.abs()[finite])).all()


@pytest.fixture
def problem():
    return Problem


@pytest.fixture(scope="module", params=TEMPLATES)
def service(request, tmp_path_factory):
    service = Service(tmp_path_factory.mktemp(request.param), request.param)
    yield service
    service.server.wait_until_idle()
    assert service.server.stop() == 0
