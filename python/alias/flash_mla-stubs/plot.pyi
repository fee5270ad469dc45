from flash_mla_kernels.plot import *
