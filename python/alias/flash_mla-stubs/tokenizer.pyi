from flash_mla_kernels.tokenizer import *
