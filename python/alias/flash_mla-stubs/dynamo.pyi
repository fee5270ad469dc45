from flash_mla_kernels.dynamo import *
