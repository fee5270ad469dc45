"""A worker of NVIDIA Dynamo over the engine: ``python -m flash_mla.dynamo --model DIR`` (docs/dynamo.md).

Dynamo's frontend has the HTTP interface, the tokenizer and the router; a worker gets tokens and gives tokens. It tells the
router which prompts its prefix cache holds and how full it is. Only ``worker`` imports Dynamo.
"""

__all__ = []
