#pragma once

#include "flash_mla/engine.h"
#include "server/api_error.h"

namespace flash_mla::server {

/// Reads what a body says of single tokens: logit_bias, allowed_token_ids, min_tokens, bad_words,
/// bad_words_ids. Throws ApiError that names the field.
void read_token_rules(const Body& json, SamplingParams& params);

}  // namespace flash_mla::server
