"""What flash-mla-vllm takes from vLLM is in the releases it supports, by their published sources.

Run by `./run plugin-test`: it downloads some 1.5 GB of wheels, installs none and needs no GPU.
"""

import ast
import importlib.util
from pathlib import Path

import pytest
from wheels import Wheel, calls_of, parameters

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "python" / "plugins" / "vllm" / "flash_mla_vllm"
MLA = "vllm.model_executor.layers.attention.mla_attention"
BACKEND = "vllm.v1.attention.backend"
REGISTRY = "vllm.v1.attention.backends.registry"
SPARSE = "vllm.v1.attention.backends.mla.flashmla_sparse"
PREFILL = "vllm.v1.attention.backends.mla.prefill"
CPU_MLA = "vllm.v1.attention.backends.mla.cpu_mla"
# The class of ours: what it derives from.
ON_GPU = {
    ("hopper", "FlashMLAHopperBackend"): (MLA, "MLACommonBackend"),
    ("hopper", "FlashMLAHopperImpl"): (MLA, "MLACommonImpl"),
    ("hopper", "FlashMLAHopperBuilder"): (MLA, "MLACommonMetadataBuilder"),
    ("sparse", "FlashMLASparseHopperBackend"): (SPARSE, "FlashMLASparseBackend"),
    ("sparse", "FlashMLASparseHopperImpl"): (SPARSE, "FlashMLASparseImpl"),
    ("prefill", "FlashMLAPrefillBackend"): (f"{PREFILL}.base", "MLAPrefillBackend"),
    ("decode", "DecodeMetadataBuilder"): (MLA, "MLACommonMetadataBuilder"),
}
ON_CPU = {
    ("cpu", "FlashMLACpuBackend"): (CPU_MLA, "CPUMLABackend"),
    ("cpu", "FlashMLACpuImpl"): (CPU_MLA, "CPUMLAImpl"),
}


@pytest.fixture(scope="module", params=["0.26.0", "0.28.0", "0.30.0", "0.33.0"])
def vllm(request):
    return Wheel("vllm", request.param)


def plugin_module(name):
    return ast.parse((PLUGIN / f"{name}.py").read_text())


def plugin():
    spec = importlib.util.spec_from_file_location("flash_mla_vllm", PLUGIN / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_cpu_mla(vllm):
    return plugin().refusal(vllm.version, plugin().SUPPORTED_ON_CPU) is None


def derived(vllm):
    return {**ON_GPU, **(ON_CPU if has_cpu_mla(vllm) else {})}


def members_of(cls):
    found = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    for node in cls.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found[target.id] = node
    return found


def test_the_releases_that_are_refused():
    refusal = plugin().refusal
    for version in ("0.26.0", "0.28.1", "0.32.0+cpu", "0.33.2rc1"):
        assert refusal(version) is None
    for version in ("0.25.9", "0.34.0", "1.0.0", "dev"):
        assert refusal(version) == (
            f"flash-mla-vllm supports vLLM 0.26 to 0.33, this is vLLM {version}; its backend is not registered"
        )


def test_every_name_that_is_imported_is_there(vllm):
    checked = 0
    for path in PLUGIN.glob("*.py"):
        if path.stem == "cpu" and not has_cpu_mla(vllm):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "vllm":
                missing = {alias.name for alias in node.names} - vllm.names(node.module)
                assert not missing, f"{path.name}: {node.module} has no {missing}"
                checked += 1
    assert checked > 4


def test_whatever_a_class_of_ours_overrides_is_there_with_its_arguments(vllm):
    for (module, name), base in derived(vllm).items():
        theirs = vllm.members(*base)
        assert theirs, f"no class {base}"
        (ours,) = [n for n in plugin_module(module).body if isinstance(n, ast.ClassDef) and n.name == name]
        for member, node in members_of(ours).items():
            if member == "supports_out" and vllm.release < (0, 27):
                continue  # asked from then on
            assert member in theirs, f"{base[1]} has no {member}: what {name} says is never read"
            if not isinstance(node, ast.FunctionDef) or node.args.kwarg and not node.args.args[1:]:
                continue
            wanted, given = parameters(theirs[member]), parameters(node)
            if member != "__init__":
                extra = [p for p, default in given.items() if p not in wanted and not default]
                assert not extra, f"{name}.{member} wants {extra}, which {base[1]} does not give"
            unknown = [p for p in wanted if p not in given]
            assert not unknown or node.args.kwarg, f"{name}.{member} does not take {unknown}"


def test_supports_combination_is_called_with_our_arguments_in_their_order(vllm):
    (call,) = calls_of(vllm.module(BACKEND), "supports_combination")
    ours = next(n for n in ast.walk(plugin_module("hopper")) if getattr(n, "name", "") == "supports_combination")
    assert not call.keywords and [arg.id for arg in call.args] == list(parameters(ours))


def test_build_decode_is_called_by_name(vllm):
    (call,) = calls_of(vllm.module(MLA), "_build_decode")
    assert not call.args and all(keyword.arg for keyword in call.keywords)
    assert {"block_table_tensor", "seq_lens_device"} <= {keyword.arg for keyword in call.keywords}


def test_the_decode_metadata_can_be_extended(vllm):
    (cls,) = vllm.classes(MLA, "MLACommonDecodeMetadata")
    assert any(ast.unparse(decorator).startswith("dataclass") for decorator in cls.decorator_list)
    fields = {node.target.id: node.value for node in cls.body if isinstance(node, ast.AnnAssign)}
    assert {"block_table", "seq_lens"} <= set(fields)
    assert not any(fields.values()), "a field with a default: ours has none and may not follow it"
    assert {"decode", "num_decodes"} <= set(vllm.members(MLA, "MLACommonMetadata"))


def test_forward_mqa_is_called_as_ours_takes_it_and_the_impl_has_what_it_reads(vllm):
    calls = calls_of(vllm.module(MLA), "forward_mqa")
    assert calls and all(len(call.args) == 4 and not call.keywords for call in calls)
    impl = (CPU_MLA, "CPUMLAImpl") if has_cpu_mla(vllm) else (MLA, "MLACommonImpl")
    for module, name in {impl, (MLA, "MLACommonImpl")}:
        assert {"scale", "kv_lora_rank", "supports_quant_query_input"} <= vllm.assigned(module, name)
    assert "need_to_return_lse_for_decode" in vllm.members(MLA, "MLACommonImpl")


def test_the_functions_of_sparse_attention_are_called_as_ours_take_it(vllm):
    tree = vllm.module(SPARSE)
    fp8, rows = calls_of(tree, "_fp8_flash_mla_kernel"), calls_of(tree, "_bf16_flash_mla_kernel")
    named = {"q", "kv_c_and_k_pe_cache", "topk_indices", "kernel_metadata"}
    assert fp8 and all(not call.args and {k.arg for k in call.keywords} == named for call in fp8)
    # Out and, from some release on, lse: in the release in which the heads became an argument.
    function = vllm.members(SPARSE, "FlashMLASparseImpl")["_bf16_flash_mla_kernel"]
    returns_lse = "actual_num_heads" in parameters(function)
    assert ast.unparse(function.returns) == ("tuple[torch.Tensor, torch.Tensor]" if returns_lse else "torch.Tensor")
    assert rows and all(3 <= len(call.args) <= 6 for call in rows)
    assert "softmax_scale" in vllm.assigned(SPARSE, "FlashMLASparseImpl")
    # In both, our kernels stand where vLLM calls FlashMLA's, and nowhere else does it.
    callers = {
        member.name
        for member in vllm.classes(SPARSE, "FlashMLASparseImpl")[0].body
        if isinstance(member, ast.FunctionDef)
        and {"flash_mla_with_kvcache", "flash_mla_sparse_fwd"}
        & {n.id for n in ast.walk(member) if isinstance(n, ast.Name)}
    }
    assert callers == {"_fp8_flash_mla_kernel", "_bf16_flash_mla_kernel"}


def test_the_class_behind_custom_is_looked_up_by_attribute_and_by_the_models_key(vllm):
    lookup = ast.unparse(vllm.function("vllm.utils.import_utils", "resolve_obj_by_qualname"))
    assert "importlib.import_module" in lookup and "getattr(" in lookup
    assert "resolve_obj_by_qualname(self.get_path())" in ast.unparse(vllm.module(REGISTRY))
    assert "get_current_vllm_config" in vllm.names("vllm.config")
    assert "index_topk" in ast.unparse(vllm.module("vllm.model_executor.models.deepseek_v2"))
    assert "hf_text_config" in ast.unparse(vllm.module("vllm.config.model"))
    # What an FP8 cache looks like goes by the backend's name.
    assert "'FLASHMLA_SPARSE' and is_quantized_kv_cache" in ast.unparse(vllm.module(MLA)).replace('"', "'")


def test_the_scale_of_a_cache_of_e4m3_is_a_number_of_the_layer(vllm):
    assert "layer._k_scale_float" in ast.unparse(vllm.module("vllm.model_executor.layers.attention.attention"))
    assert "kv_cache.view(current_platform.fp8_dtype())" in ast.unparse(vllm.module(MLA))


def test_prefill_is_registered_and_called_as_ours_takes_it(vllm):
    registry = f"{PREFILL}.registry"
    assert list(parameters(vllm.function(registry, "register_mla_prefill_backend")))[:2] == ["backend", "class_path"]
    assert "CUSTOM" in vllm.members(registry, "MLAPrefillBackendEnum")
    first = "chunk_idx" if vllm.release < (0, 28) else "chunk"
    contexts = calls_of(vllm.module(MLA), "run_prefill_context_chunk")
    assert contexts and all({first, "q", "k", "v"} <= {k.arg for k in call.keywords} and not call.args for call in contexts)
    assert {k.arg for call in contexts for k in call.keywords} <= {first, "q", "k", "v", "out"}
    (new,) = calls_of(vllm.module(MLA), "run_prefill_new_tokens")
    assert {k.arg for k in new.keywords} <= {"q", "k", "v", "return_softmax_lse", "out", "output_scale"} and not new.args
    # Where the lengths are that it is given.
    metadata = vllm.classes(MLA, "MLACommonPrefillMetadata")[0]
    (context,) = [n for n in ast.walk(metadata) if getattr(n, "name", "").endswith("ContextChunk" if first == "chunk" else "ContextMetadata")]
    fields = {n.target.id for n in context.body if isinstance(n, ast.AnnAssign)}
    assert {"cu_seq_lens"} | ({"query_start_loc"} if first == "chunk" else set()) <= fields
    assert "query_start_loc" in vllm.members(MLA, "MLACommonPrefillMetadata")
    assert "_prefill_metadata" in vllm.assigned(f"{PREFILL}.base", "MLAPrefillBackend")
    # All heads have the same rotary part.
    assert "k_pe" in ast.unparse(vllm.module(MLA)) and "_concat_k_nope_k_pe" in ast.unparse(vllm.module(MLA))


def test_the_values_that_are_named_are_there(vllm):
    assert "UNIFORM_BATCH" in vllm.members(BACKEND, "AttentionCGSupport")
    assert "DECODER" in vllm.members(BACKEND, "AttentionType")
    assert "UNIFORM" in vllm.members(MLA, "QueryLenSupport")
    assert "base" in vllm.members(BACKEND, "MultipleOf")
    assert "576" in ast.unparse(vllm.members(MLA, "MLACommonBackend")["get_supported_head_sizes"])


def test_batch_invariance_is_asked_for_and_answered(vllm):
    assert '"VLLM_BATCH_INVARIANT"' in ast.unparse(vllm.module("vllm.envs")).replace("'", '"')
    answer = vllm.members(BACKEND, "AttentionBackend")["supports_batch_invariance"]
    assert [node.id for node in answer.decorator_list] == ["classmethod"] and not parameters(answer)


def test_the_plugin_is_found_and_its_backend_registered(vllm):
    assert '"vllm.general_plugins"' in ast.unparse(vllm.module("vllm.plugins")).replace("'", '"')
    assert list(parameters(vllm.function(REGISTRY, "register_backend")))[:2] == ["backend", "class_path"]
    backends = vllm.members(REGISTRY, "AttentionBackendEnum")
    assert "CUSTOM" in backends and ("CPU_MLA" in backends or not has_cpu_mla(vllm))
    assert {"is_cpu", "is_cuda"} <= set(vllm.members("vllm.platforms.interface", "Platform"))
    assert "current_platform" in ast.unparse(vllm.module("vllm.platforms"))
    assert "__version__" in ast.unparse(vllm.module("vllm"))
    if has_cpu_mla(vllm):
        assert "AttentionBackendEnum.CPU_MLA.get_path()" in ast.unparse(vllm.module("vllm.platforms.cpu"))


def test_no_wheel_of_ours_has_a_file_of_vllms(vllm):
    theirs = {name.split("/")[0] for name in vllm.files}
    assert "vllm" in theirs
    assert not theirs & {"flash_mla", "flash_mla_kernels", "flash_mla_alias.py", "flash_mla_vllm", "flash_mla-stubs"}
