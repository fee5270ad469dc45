from flash_mla_kernels.async_llm import *
