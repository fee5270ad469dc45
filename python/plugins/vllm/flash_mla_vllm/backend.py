"""The class behind vLLM's backend CUSTOM: of attention to lists where the model has an indexer, of dense attention elsewhere.

vLLM looks the class up by this module's name and ``Backend``, while it builds the layers of a model.
"""


def __getattr__(name):
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if is_sparse():
        from .sparse import FlashMLASparseHopperBackend

        return FlashMLASparseHopperBackend
    from .hopper import FlashMLAHopperBackend

    return FlashMLAHopperBackend


def is_sparse():
    """Whether the model that vLLM is building selects tokens (DeepSeek V3.2, GLM-5): by the key that vLLM goes by."""
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config
    return model is not None and hasattr(model.hf_text_config, "index_topk")
