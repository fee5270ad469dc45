from flash_mla_kernels.flashinfer import *
