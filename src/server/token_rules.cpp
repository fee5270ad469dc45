#include "server/token_rules.h"

#include <fmt/format.h>

#include <charconv>
#include <string>

#include "server/body.h"
#include "server/limits.h"

namespace flash_mla::server {
namespace {

void check_count(const char* key, std::size_t count, std::size_t most) {
  if (count > most)
    throw bad_request(fmt::format("{} has {} entries, expected at most {}", key, count, most), key);
}

std::int32_t token_named(const std::string& name) {
  std::int32_t token = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), token);
  if (error != std::errc() || end != name.data() + name.size() || token < 0) {
    throw bad_request(
        fmt::format("logit_bias has the key \"{}\", expected token ids", name.substr(0, kMaxLoggedBytes)),
        "logit_bias");
  }
  return token;
}

void read_bias(const Body& json, SamplingParams& p) {
  const Body* bias = find(json, "logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) throw wrong_type("logit_bias", *bias, "an object of token ids and numbers");
  check_count("logit_bias", bias->size(), kMaxNamedTokens);
  for (const auto& [name, value] : bias->items()) {
    if (!value.is_number()) throw wrong_type("logit_bias", value, "numbers from -100 to 100");
    p.logit_bias.push_back({token_named(name), value.get<double>()});
  }
}

void read_bad_words(const Body& json, SamplingParams& p) {
  if (const Body* words = find(json, "bad_words")) {
    if (!words->is_array()) throw wrong_type("bad_words", *words, "an array of strings");
    check_count("bad_words", words->size(), kMaxBadWords);
    for (const Body& word : *words) {
      if (!word.is_string()) throw wrong_type("bad_words", word, "strings");
      p.bad_words.push_back(word.get<std::string>());
      if (p.bad_words.back().size() > kMaxBadWordBytes) {
        throw bad_request(fmt::format("bad_words has one of more than {} bytes", kMaxBadWordBytes),
                          "bad_words");
      }
    }
  }
  if (const Body* runs = find(json, "bad_words_ids")) {
    if (!runs->is_array()) throw wrong_type("bad_words_ids", *runs, "an array of arrays of token ids");
    check_count("bad_words_ids", runs->size(), kMaxBadWords);
    for (const Body& run : *runs) {
      if (!run.is_array() || run.empty()) throw wrong_type("bad_words_ids", run, "arrays of token ids");
      check_count("bad_words_ids", run.size(), kMaxBadWordBytes);
      p.bad_token_ids.push_back(token_ids(run, "bad_words_ids"));
    }
  }
}

}  // namespace

void read_token_rules(const Body& json, SamplingParams& p) {
  read_bias(json, p);
  if (const Body* allowed = find(json, "allowed_token_ids")) {
    if (!allowed->is_array()) throw wrong_type("allowed_token_ids", *allowed, "an array of token ids");
    if (allowed->empty())
      throw bad_request("allowed_token_ids is empty, expected token ids", "allowed_token_ids");
    check_count("allowed_token_ids", allowed->size(), kMaxNamedTokens);
    p.allowed_token_ids = token_ids(*allowed, "allowed_token_ids");
  }
  read(json, "min_tokens", p.min_tokens);
  read_bad_words(json, p);
}

}  // namespace flash_mla::server
