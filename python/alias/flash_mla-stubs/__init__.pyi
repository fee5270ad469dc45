from flash_mla_kernels import *
from flash_mla_kernels import __version__ as __version__
