from flash_mla_kernels.llm import *
