#pragma once

#include "flash_mla/decode.h"
#include "flash_mla/dense_fp8.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/merge.h"
#include "flash_mla/quantise.h"
#include "flash_mla/reference.h"
#include "flash_mla/schedule.h"
#include "flash_mla/sparse.h"
#include "flash_mla/tensor.h"
#include "flash_mla/top_k.h"
