from flash_mla_kernels.planner import *
