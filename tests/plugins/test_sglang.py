"""flash-mla-sglang: its two functions called as SGLang 0.5.23's backend calls them, and that it does call them so.

Run by `./run plugin-test`; it downloads SGLang's wheels, installs none and needs no GPU.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from wheels import Wheel, calls_of, parameters

import flash_mla_kernels

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "python" / "plugins" / "sglang" / "flash_mla_sglang" / "__init__.py"
BACKEND = "sglang.srt.layers.attention.flashmla_backend"
INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
DSA = "sglang.srt.layers.attention.dsa_backend"
HOOKS = "sglang.srt.plugins.hook_registry"


@pytest.fixture(scope="module")
def sglang():
    return Wheel("sglang", "0.5.23")


@pytest.fixture(scope="module")
def plugin():
    spec = importlib.util.spec_from_file_location("flash_mla_sglang", PLUGIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original(*arguments, **options):
    return "original", arguments, options


def problem(s_q, dtype=torch.bfloat16):
    """A batch as SGLang's buffers hold it: -1 past a request's pages, a pool that is a view with another stride."""
    g = torch.Generator().manual_seed(s_q)
    lengths = torch.tensor([300, 64, 5], dtype=torch.int64)
    pool = (torch.randn(12, 2, 64, 1, 576, generator=g) / 10).to(dtype)
    table = torch.full((3, 8), -1, dtype=torch.int32)
    pages = torch.randperm(12, generator=g).to(torch.int32)
    for i, (first, count) in enumerate([(0, 5), (5, 1), (6, 1)]):
        table[i, :count] = pages[first : first + count]
    q = (torch.randn(3, s_q, 16, 576, generator=g) / 10).to(dtype)
    return q, pool[:, 0], table, lengths


@pytest.mark.parametrize("s_q", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_planned_into_the_buffers_of_a_graph(plugin, s_q, dtype):
    q, cache, table, lengths = problem(s_q, dtype)
    metadata, num_splits = plugin.plan(original, lengths.to(torch.int32), s_q * 16, 1, is_fp8_kvcache=False)
    rows, splits = torch.empty(256, 8, dtype=torch.int32), torch.empty(65, dtype=torch.int32)
    rows[: metadata.shape[0]].copy_(metadata)
    splits[:4].copy_(num_splits)
    out, lse = plugin.decode(
        original,
        q=q,
        k_cache=cache,
        block_table=table[:3],
        cache_seqlens=lengths.to(torch.int32),
        head_dim_v=512,
        tile_scheduler_metadata=rows[: metadata.shape[0]],
        num_splits=splits[:4],
        softmax_scale=0.1352,
        causal=True,
    )
    expected, expected_lse = flash_mla_kernels.reference_dense_decode(
        q, cache.contiguous(), table.clamp(min=0), lengths.to(torch.int32), 512, softmax_scale=0.1352, causal=True
    )
    assert out.dtype == dtype and (out.double() - expected).abs().max() < 2e-3
    assert (lse.double() - expected_lse).abs().max() < 1e-3


def test_what_is_not_ours_goes_to_the_original_with_its_arguments(plugin):
    q, cache, table, lengths = problem(1)
    assert plugin.plan(original) == ("original", (None, None, None, None, False, None), {})
    assert plugin.plan(original, lengths.int(), 16, 1, is_fp8_kvcache=True, topk=64)[0] == "original"
    rows, splits = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    call = (cache, table, lengths.int(), 512, rows, splits)
    for first, options in [
        (q, dict(indices=table)),
        (q, dict(descale_q=splits, descale_k=splits)),
        (q, dict(is_fp8_kvcache=True)),
        (q, dict(kv_format="V32_NO_ROPE")),
        (q.float(), {}),
    ]:
        name, arguments, given = plugin.decode(original, first, *call, softmax_scale=0.1, causal=True, **options)
        assert name == "original" and given == options
        assert arguments[0] is first and arguments[5] is rows and arguments[-2:] == (0.1, True)
    assert plugin.decode(original, q, *call[:4], object())[0] == "original"


@pytest.mark.parametrize("s_q", [1, 4])
def test_queries_and_cache_of_e4m3(plugin, s_q):
    q, cache, table, lengths = problem(s_q, torch.float32)
    descale_q, descale_k = torch.tensor([0.004]), torch.tensor([0.002])
    q8, cache8 = (q / descale_q).to(torch.float8_e4m3fn), (cache / descale_k).to(torch.float8_e4m3fn)
    metadata, num_splits = plugin.plan(original, lengths.int(), s_q * 16, 1, is_fp8_kvcache=True)
    out, lse = plugin.decode(
        original,
        q=q8,
        k_cache=cache8,
        block_table=table,
        cache_seqlens=lengths.int(),
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        softmax_scale=0.1352,
        causal=True,
        descale_q=descale_q,
        descale_k=descale_k,
    )
    expected, expected_lse = flash_mla_kernels.reference_dense_decode(
        q8.float() * descale_q,
        (cache8.float() * descale_k).contiguous(),
        table.clamp(min=0),
        lengths.int(),
        512,
        softmax_scale=0.1352,
        causal=True,
    )
    assert out.dtype == torch.bfloat16 and (out.double() - expected).abs().max() < 4e-3
    assert (lse.double() - expected_lse).abs().max() < 4e-3


def sparse_problem(tokens):
    """Lists padded with -1 at their ends, and heads padded with zeros, as SGLang pads them."""
    g = torch.Generator().manual_seed(tokens)
    pages = torch.zeros(4, 64, 1, 656, dtype=torch.uint8)
    latent, rope = torch.randn(256, 512, generator=g).bfloat16(), torch.randn(256, 64, generator=g).bfloat16()
    flash_mla_kernels.append_kv(latent, rope, torch.arange(256), pages, recipe="sglang")
    q = torch.zeros(tokens, 64, 576, dtype=torch.bfloat16)
    q[:, :16] = (torch.randn(tokens, 16, 576, generator=g) / 8).bfloat16()
    lists = torch.stack([torch.randperm(256, generator=g)[:128] for _ in range(tokens)]).int()
    lengths = torch.tensor([128, 1, 100, 0, 64][:tokens], dtype=torch.int32)
    for chosen, length in zip(lists, lengths):
        chosen[length:] = -1
    return q, pages, lists, lengths


def attention(q, rows, lists):
    """By the definition, in float64: out, and lse in natural log."""
    out = torch.zeros(*q.shape[:2], 512, dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("inf"), dtype=torch.float64)
    for i, chosen in enumerate(lists):
        keys = rows[chosen[chosen >= 0].long()].double()
        if len(keys):
            scores = q[i].double() @ keys.T * 0.1352
            out[i], lse[i] = torch.softmax(scores, -1) @ keys[:, :512], torch.logsumexp(scores, -1)
    return out, lse


def test_lists_over_the_cache_of_v32(plugin):
    q, pages, lists, lengths = sparse_problem(5)
    out, lse = plugin.decode(
        original,
        q=q.unsqueeze(1),
        k_cache=pages.view(torch.float8_e4m3fn),
        cache_seqlens=lengths,
        head_dim_v=512,
        tile_scheduler_metadata=torch.zeros(2, 8, dtype=torch.int32),
        num_splits=torch.zeros(6, dtype=torch.int32),
        softmax_scale=0.1352,
        indices=lists.unsqueeze(1),
        block_table=torch.empty((5, 0), dtype=torch.int32),
        is_fp8_kvcache=True,
        kv_format="V32",
    )
    expected, expected_lse = attention(q, flash_mla_kernels.gather_kv(pages, torch.arange(256)), lists)
    assert (out.squeeze(1).double() - expected).abs().max() < 1e-2
    finite = expected_lse.isfinite()
    assert (lse.squeeze(-1).double() - expected_lse)[finite].abs().max() < 2e-3 and (lse[3] == float("inf")).all()


@pytest.mark.parametrize("use_legacy", [True, False])
def test_lists_of_prompts_over_rows_of_16_bits(plugin, use_legacy):
    q, pages, lists, lengths = sparse_problem(5)
    rows = flash_mla_kernels.gather_kv(pages, torch.arange(256), dtype="bfloat16")
    options = {} if use_legacy else {"use_legacy": False}
    out, _, lse = plugin.sparse_prefill(
        original,
        q=q,
        kv=rows.unsqueeze(1),
        indices=lists.unsqueeze(1),
        sm_scale=0.1352,
        d_v=512,
        attn_sink=None,
        topk_length=lengths,
        **options,
    )
    expected, expected_lse = attention(q, rows, lists)
    assert (out.double() - expected).abs().max() < 1e-2
    lse, finite = lse.double() * (torch.log(torch.tensor(2.0)).item() if use_legacy else 1), expected_lse.isfinite()
    assert (lse - expected_lse)[finite].abs().max() < 2e-3 and (lse[3] == float("inf")).all()


def test_lists_of_prompts_that_are_not_ours(plugin):
    q, pages, lists, lengths = sparse_problem(2)
    call = (lists.unsqueeze(1), 0.1, 512, None, lengths)
    assert plugin.sparse_prefill(original, q, pages.flatten(0, 1), *call)[0] == "original"
    got = plugin.sparse_prefill(original, q[..., :512], q[..., :512], *call, use_legacy=False)
    assert got[0] == "original" and got[2] == {"use_legacy": False}


def test_the_releases_that_are_refused(plugin):
    assert plugin.refusal("0.5.23") is None and plugin.refusal("0.5.23.post1") is None
    for version in ("0.5.22", "0.5.24", "0.6.0"):
        assert plugin.refusal(version) == (
            f"flash-mla-sglang supports SGLang 0.5.23, this is SGLang {version}; its kernels are not used"
        )


def test_the_plugin_is_found_and_its_hooks_can_be_registered(sglang):
    assert "'sglang.srt.plugins'" in ast.unparse(sglang.module("sglang.srt.plugins"))
    register = sglang.members(HOOKS, "HookRegistry")["register"]
    assert list(parameters(register))[:3] == ["target", "hook", "hook_type"]
    assert "AROUND" in sglang.members(HOOKS, "HookType")
    # The wrapper calls hook(original, *args, **kwargs).
    assert "hook(fn, *args, **kwargs)" in ast.unparse(sglang.function(HOOKS, "_wrap_fn")).replace("original_fn", "fn")


def test_the_functions_are_there_under_the_names_that_are_hooked_and_taken_from_there(sglang):
    names = {"get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd"}
    assert names <= sglang.names(INTERFACE) and names - {"flash_mla_sparse_fwd"} <= sglang.names(BACKEND)
    # A hook reaches modules that have taken the function by name already; others take it from the module.
    assert "setattr(mod, attr_name, wrapped)" in ast.unparse(sglang.module(HOOKS))
    for module in (BACKEND, DSA):
        imports = [n for n in ast.walk(sglang.module(module)) if isinstance(n, ast.ImportFrom)]
        assert any(n.module == INTERFACE for n in imports)


def test_the_sparse_backend_calls_them_as_the_tests_above_do(sglang):
    tree = sglang.module(DSA)
    (decode,) = [node for node in ast.walk(tree) if _is_call(node, "flash_mla_with_kvcache")]
    (prefill,) = [node for node in ast.walk(tree) if _is_call(node, "flash_mla_sparse_fwd")]
    given = {"q", "k_cache", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits", "softmax_scale"}
    given |= {"indices", "block_table", "is_fp8_kvcache", "kv_format"}
    assert not decode.args and {k.arg for k in decode.keywords} == given
    given = {"q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length"}
    assert not prefill.args and {k.arg for k in prefill.keywords} == given
    assert "'V32_NO_ROPE' if self.qk_rope_head_dim == 0 else 'V32'" in ast.unparse(tree)
    plans = [node for node in ast.walk(tree) if _is_call(node, "get_mla_metadata")]
    assert plans and all({"cache_seqlens", "is_fp8_kvcache", "topk"} <= {k.arg for k in call.keywords} for call in plans)


def test_the_functions_take_what_ours_take_in_that_order(sglang, plugin):
    code = ast.parse(PLUGIN.read_text())
    ours = {n.name: list(parameters(n)) for n in ast.walk(code) if isinstance(n, ast.FunctionDef)}
    assert ours["plan"][1:] == list(parameters(sglang.function(INTERFACE, "get_mla_metadata")))
    assert ours["sparse_prefill"][1:] == list(parameters(sglang.function(INTERFACE, "flash_mla_sparse_fwd")))
    theirs = list(parameters(sglang.function(INTERFACE, "flash_mla_with_kvcache")))
    assert ours["decode"][1:] == theirs[: len(ours["decode"]) - 1]


def test_the_backend_calls_them_as_the_test_above_does(sglang):
    tree = sglang.module(BACKEND)
    plans = [node for node in ast.walk(tree) if _is_call(node, "get_mla_metadata")]
    assert plans and all([k.arg for k in call.keywords] == ["is_fp8_kvcache"] and len(call.args) == 3 for call in plans)
    decodes = [node for node in ast.walk(tree) if _is_call(node, "flash_mla_with_kvcache")]
    common = {"q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits"}
    names = [{k.arg for k in call.keywords} for call in decodes]
    assert names and not any(call.args for call in decodes)
    assert all(given - common <= {"softmax_scale", "causal", "descale_q", "descale_k"} for given in names)
    assert any(given == common | {"softmax_scale", "causal"} for given in names)
    assert calls_of(tree, "copy_"), "the plan is copied into buffers"


def _is_call(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def test_no_wheel_of_ours_has_a_file_of_sglangs(sglang):
    flash_mla = Wheel("sgl-flash-mla", "1.0.0")
    assert "flash_mla/__init__.py" in flash_mla.files
    theirs = {name.split("/")[0] for name in [*sglang.files, *flash_mla.files]}
    ours = {"flash_mla_kernels", "flash_mla_alias.py", "flash_mla_alias.pth", "flash_mla-stubs", "flash_mla_sglang"}
    assert not theirs & ours
