from flash_mla_kernels.model import *
