#include "checkpoint/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "base/json.h"
#include "flash_mla/error.h"
#include "temporary_directory.h"

namespace flash_mla::checkpoint {
namespace {

using ::testing::HasSubstr;

Json published(const std::string& name) {
  const std::string path = std::string(FLASH_MLA_MODELS) + "/" + name + ".json";
  return parse_json(read_file(path), path);
}

ModelConfig parse(const Json& json) { return parse_config(json.dump(), "config.json"); }

TEST(Config, V2Lite) {
  const ModelConfig c = parse(published("deepseek-v2-lite"));
  EXPECT_EQ(c.model_type, "deepseek_v2");
  EXPECT_EQ(c.vocab_size, 102400);
  EXPECT_EQ(c.hidden_size, 2048);
  EXPECT_EQ(c.intermediate_size, 10944);
  EXPECT_EQ(c.num_hidden_layers, 27);
  EXPECT_EQ(c.num_attention_heads, 16);
  EXPECT_EQ(c.q_lora_rank, 0);
  EXPECT_EQ(c.kv_lora_rank, 512);
  EXPECT_EQ(c.qk_nope_head_dim, 128);
  EXPECT_EQ(c.qk_rope_head_dim, 64);
  EXPECT_EQ(c.v_head_dim, 128);
  EXPECT_EQ(c.n_routed_experts, 64);
  EXPECT_EQ(c.n_shared_experts, 2);
  EXPECT_EQ(c.num_experts_per_tok, 6);
  EXPECT_EQ(c.moe_intermediate_size, 1408);
  EXPECT_EQ(c.first_k_dense_replace, 1);
  EXPECT_EQ(c.topk_method, TopkMethod::kGreedy);
  EXPECT_EQ(c.scoring_func, ScoringFunc::kSoftmax);
  EXPECT_FALSE(c.norm_topk_prob);
  EXPECT_EQ(c.max_position_embeddings, 163840);
  EXPECT_EQ(c.rope_scaling.factor, 40);
  EXPECT_EQ(c.rope_scaling.mscale, 0.707);
  EXPECT_EQ(c.rope_scaling.mscale_all_dim, 0.707);
  EXPECT_EQ(c.rope_scaling.original_max_position_embeddings, 4096);
  EXPECT_TRUE(c.rope_interleave);
  EXPECT_EQ(c.stored.fp8_block_rows, 0);
  EXPECT_EQ(c.bos_token_id, 100000);
  EXPECT_EQ(c.eos_token_ids, std::vector{100001});
  EXPECT_FALSE(c.is_moe_layer(0));
  EXPECT_TRUE(c.is_moe_layer(1));
  EXPECT_NEAR(c.softmax_scale(), 0.1147214, 5e-8);
}

TEST(Config, V2) {
  const ModelConfig c = parse(published("deepseek-v2"));
  EXPECT_EQ(c.q_lora_rank, 1536);
  EXPECT_EQ(c.topk_method, TopkMethod::kGroupLimitedGreedy);
  EXPECT_EQ(c.n_group, 8);
  EXPECT_EQ(c.topk_group, 3);
  EXPECT_EQ(c.routed_scaling_factor, 16.0);
  EXPECT_NEAR(c.softmax_scale(), 0.1147214, 5e-8);
}

TEST(Config, V3) {
  const ModelConfig c = parse(published("deepseek-v3"));
  EXPECT_EQ(c.model_type, "deepseek_v3");
  EXPECT_EQ(c.topk_method, TopkMethod::kNoAuxTc);
  EXPECT_EQ(c.scoring_func, ScoringFunc::kSigmoid);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_EQ(c.routed_scaling_factor, 2.5);
  EXPECT_EQ(c.first_k_dense_replace, 3);
  EXPECT_EQ(c.stored.fp8_block_rows, 128);
  EXPECT_EQ(c.stored.fp8_block_columns, 128);
  EXPECT_NEAR(c.softmax_scale(), 0.1352338, 5e-8);
}

TEST(Config, V32HasAnIndexerInEveryLayer) {
  const ModelConfig c = parse(published("deepseek-v3.2"));
  EXPECT_EQ(c.model_type, "deepseek_v32");
  EXPECT_EQ(c.index_topk, 2048);
  EXPECT_EQ(c.index_n_heads, 64);
  EXPECT_EQ(c.index_head_dim, 128);
  EXPECT_FALSE(c.indexer_rope_interleave);
  EXPECT_TRUE(c.has_indexer(0));
  EXPECT_TRUE(c.has_indexer(60));
  EXPECT_EQ(c.scoring_func, ScoringFunc::kSigmoid);
}

TEST(Config, Glm5) {
  Json json = published("glm-5");
  const ModelConfig c = parse(json);
  EXPECT_EQ(c.num_attention_heads, 64);
  EXPECT_EQ(c.qk_nope_head_dim, 192);
  EXPECT_EQ(c.v_head_dim, 256);
  EXPECT_EQ(c.index_n_heads, 32);
  EXPECT_TRUE(c.indexer_rope_interleave);
  EXPECT_TRUE(c.has_indexer(77));
  json["num_hidden_layers"] = 5;
  json["index_topk_pattern"] = "FSSFS";
  EXPECT_FALSE(parse(json).has_indexer(1));
  EXPECT_TRUE(parse(json).has_indexer(3));
  json.erase("index_topk_pattern");
  json["index_topk_freq"] = 2;  // from layer 1 on, every second
  const ModelConfig every_second = parse(json);
  for (const int layer : {0, 1, 3}) EXPECT_TRUE(every_second.has_indexer(layer)) << layer;
  for (const int layer : {2, 4}) EXPECT_FALSE(every_second.has_indexer(layer)) << layer;
}

TEST(Config, KimiK2IsV3) {
  const ModelConfig c = parse(published("kimi-k2"));
  EXPECT_EQ(c.num_attention_heads, 64);
  EXPECT_EQ(c.n_routed_experts, 384);
  EXPECT_EQ(c.topk_method, TopkMethod::kNoAuxTc);
  EXPECT_EQ(c.index_topk, 0);
}

TEST(Config, PlainRopeHasThePlainScale) {
  Json json = published("deepseek-v3");
  json["rope_scaling"] = nullptr;
  EXPECT_DOUBLE_EQ(parse(json).softmax_scale(), 1 / std::sqrt(192.0));
  json.erase("rope_scaling");
  EXPECT_DOUBLE_EQ(parse(json).softmax_scale(), 1 / std::sqrt(192.0));
}

TEST(Config, RopeParametersOfTransformers5) {
  Json json = published("deepseek-v3");
  json["rope_parameters"] = json["rope_scaling"];
  json["rope_parameters"]["rope_type"] = "yarn";
  json["rope_parameters"]["rope_theta"] = 50000.0;
  json.erase("rope_scaling");
  json.erase("rope_theta");
  // Fields that its DeepseekV3Config does not write.
  json.erase("scoring_func");
  json.erase("topk_method");
  json.erase("moe_layer_freq");
  const ModelConfig c = parse(json);
  EXPECT_EQ(c.rope_theta, 50000.0);
  EXPECT_EQ(c.rope_scaling.factor, 40);
  EXPECT_EQ(c.topk_method, TopkMethod::kNoAuxTc);
  EXPECT_NEAR(c.softmax_scale(), 0.1352338, 5e-8);

  json["rope_parameters"] = {{"rope_theta", 10000.0}, {"rope_type", "default"}};
  EXPECT_EQ(parse(json).rope_scaling.factor, 1.0);
  EXPECT_EQ(parse(json).rope_theta, 10000.0);
}

TEST(Config, DenseModel) {
  Json json = published("deepseek-v2-lite");
  json["n_routed_experts"] = nullptr;
  const ModelConfig c = parse(json);
  EXPECT_EQ(c.n_routed_experts, 0);
  EXPECT_FALSE(c.is_moe_layer(5));
}

TEST(Config, GenerationConfigOverridesTokens) {
  const TemporaryDirectory dir;
  dir.write("config.json", published("deepseek-v3").dump());
  EXPECT_EQ(read_config(dir.path()).eos_token_ids, std::vector{1});
  dir.write("generation_config.json", R"({"bos_token_id": 7, "eos_token_id": [1, 5]})");
  const ModelConfig c = read_config(dir.path());
  EXPECT_EQ(c.bos_token_id, 7);
  EXPECT_EQ(c.eos_token_ids, (std::vector{1, 5}));
}

TEST(Config, MissingFileIsNamed) {
  const TemporaryDirectory dir;
  EXPECT_THAT(message_of<InvalidArgument>([&] { read_config(dir.path()); }),
              HasSubstr((dir.path() / "config.json").string()));
}

struct Bend {
  std::string what;
  std::string base;
  std::function<void(Json&)> bend;
  std::string message;  // a part of it
};

class Refused : public ::testing::TestWithParam<Bend> {};

TEST_P(Refused, Unsupported) {
  Json json = published(GetParam().base);
  GetParam().bend(json);
  EXPECT_THAT(message_of<Unsupported>([&] { parse(json); }), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Config, Refused,
    ::testing::Values(
        Bend{"Architecture", "deepseek-v3", [](Json& j) { j["model_type"] = "deepseek_v4"; },
             "config.json: model_type = \"deepseek_v4\": expected \"deepseek_v2\", \"deepseek_v3\""},
        Bend{"MlpTypes", "deepseek-v3.2",
             [](Json& j) {
               j["num_hidden_layers"] = 2;
               j["mlp_layer_types"] = {"dense", "sparse"};
             },
             "mlp_layer_types"},
        Bend{"RopeType", "deepseek-v3", [](Json& j) { j["rope_scaling"]["type"] = "linear"; },
             "rope_scaling.type = \"linear\": expected \"yarn\""},
        Bend{"OneMscale", "deepseek-v3",
             [](Json& j) {
               j["rope_scaling"].erase("mscale_all_dim");
               j["rope_scaling"]["mscale"] = 0.7;
             },
             "rope_scaling.mscale_all_dim is missing"},
        Bend{"OtherMscale", "deepseek-v3", [](Json& j) { j["rope_scaling"].erase("mscale"); },
             "rope_scaling.mscale is missing"},
        Bend{"AttentionFactor", "deepseek-v3", [](Json& j) { j["rope_scaling"]["attention_factor"] = 1.5; },
             "rope_scaling.attention_factor = 1.5"},
        Bend{"Scoring", "deepseek-v3", [](Json& j) { j["scoring_func"] = "softmax"; }, "scoring_func"},
        Bend{"Method", "deepseek-v2", [](Json& j) { j["topk_method"] = "noaux_tc"; }, "topk_method"},
        Bend{"NormV2", "deepseek-v2", [](Json& j) { j["norm_topk_prob"] = true; }, "norm_topk_prob = true"},
        Bend{"KvHeads", "deepseek-v2", [](Json& j) { j["num_key_value_heads"] = 8; },
             "num_key_value_heads = 8: expected num_attention_heads = 128"},
        Bend{"Quantization", "deepseek-v3", [](Json& j) { j["quantization_config"]["quant_method"] = "awq"; },
             "quantization_config.quant_method = \"awq\""},
        Bend{"PerTensorFp8", "deepseek-v3",
             [](Json& j) { j["quantization_config"].erase("weight_block_size"); },
             "quantization_config.weight_block_size is missing"},
        Bend{"Activation", "deepseek-v3", [](Json& j) { j["hidden_act"] = "gelu"; }, "hidden_act = \"gelu\""},
        Bend{"MlpBias", "deepseek-v2", [](Json& j) { j["mlp_bias"] = true; }, "mlp_bias = true"}),
    [](const auto& bend) { return bend.param.what; });

class Wrong : public ::testing::TestWithParam<Bend> {};

TEST_P(Wrong, InvalidArgument) {
  Json json = published(GetParam().base);
  GetParam().bend(json);
  EXPECT_THAT(message_of<InvalidArgument>([&] { parse(json); }), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Config, Wrong,
    ::testing::Values(
        Bend{"Missing", "deepseek-v3", [](Json& j) { j.erase("hidden_size"); },
             "config.json: hidden_size is missing"},
        Bend{"MissingQRank", "deepseek-v3", [](Json& j) { j.erase("q_lora_rank"); },
             "q_lora_rank is missing"},
        Bend{"String", "deepseek-v3", [](Json& j) { j["vocab_size"] = "many"; }, "vocab_size = \"many\""},
        Bend{"Fraction", "deepseek-v3", [](Json& j) { j["vocab_size"] = 10.5; }, "vocab_size = 10.5"},
        Bend{"Negative", "deepseek-v3", [](Json& j) { j["kv_lora_rank"] = -512; }, "kv_lora_rank = -512"},
        Bend{"Huge", "deepseek-v3", [](Json& j) { j["v_head_dim"] = 18446744073709551615u; },
             "v_head_dim = 18446744073709551615"},
        Bend{"OddRope", "deepseek-v3", [](Json& j) { j["qk_rope_head_dim"] = 63; }, "qk_rope_head_dim = 63"},
        Bend{"Groups", "deepseek-v3", [](Json& j) { j["n_group"] = 7; }, "n_group = 7"},
        Bend{"TopkGroup", "deepseek-v3", [](Json& j) { j["topk_group"] = 9; }, "topk_group = 9"},
        Bend{"TooManyExperts", "deepseek-v3", [](Json& j) { j["num_experts_per_tok"] = 129; },
             "num_experts_per_tok = 129"},
        Bend{"SmallGroups", "deepseek-v3", [](Json& j) { j["n_group"] = 256; }, "n_group = 256"},
        Bend{"IndexTopk", "deepseek-v3.2", [](Json& j) { j["index_topk"] = 4097; }, "index_topk = 4097"},
        Bend{"NoIndexTopk", "deepseek-v3.2", [](Json& j) { j.erase("index_topk"); }, "index_topk is missing"},
        Bend{"IndexDim", "deepseek-v3.2", [](Json& j) { j["index_head_dim"] = 100; }, "index_head_dim = 100"},
        Bend{"NarrowIndex", "deepseek-v3.2", [](Json& j) { j["index_head_dim"] = 32; },
             "index_head_dim = 32: expected at least qk_rope_head_dim = 64"},
        Bend{"IndexerTypes", "glm-5",
             [](Json& j) {
               j["indexer_types"] = {"full", "shared"};
             },
             "indexer_types"},
        Bend{"FirstShares", "glm-5",
             [](Json& j) {
               j["num_hidden_layers"] = 2;
               j["indexer_types"] = {"shared", "full"};
             },
             "indexer_types"},
        Bend{"Blocks", "deepseek-v3",
             [](Json& j) {
               j["quantization_config"]["weight_block_size"] = {128, 0};
             },
             "quantization_config.weight_block_size = [128,0]"},
        Bend{"Eos", "deepseek-v3", [](Json& j) { j["eos_token_id"] = "one"; }, "eos_token_id = \"one\""},
        Bend{"RopeObject", "deepseek-v3", [](Json& j) { j["rope_scaling"] = 3; },
             "rope_scaling = 3: expected a JSON object"}),
    [](const auto& bend) { return bend.param.what; });

Json int4(Json weights = {}) {
  Json all = {
      {"num_bits", 4}, {"type", "int"}, {"symmetric", true}, {"strategy", "group"}, {"group_size", 128}};
  if (weights.is_object()) all.update(weights);
  return {{"quant_method", "compressed-tensors"},
          {"format", "pack-quantized"},
          {"ignore", {"lm_head"}},
          {"kv_cache_scheme", nullptr},
          {"config_groups",
           {{"group_0",
             {{"targets", {"Linear"}},
              {"weights", all},
              {"input_activations", {{"num_bits", 8}, {"type", "float"}}},
              {"output_activations", nullptr}}}}}};
}

TEST(Config, WeightsOf4Bits) {
  Json json = published("deepseek-v3");
  json["quantization_config"] = int4();
  EXPECT_EQ(parse(json).stored, (StoredFormat{0, 0, 128}));
  json["quantization_config"] = int4({{"strategy", "channel"}, {"group_size", nullptr}});
  EXPECT_EQ(parse(json).stored, (StoredFormat{0, 0, -1}));
}

TEST(Config, QuantizationsThatAreNotKnownAreRefused) {
  const auto complaint = [](const Json& quantization) {
    Json json = published("deepseek-v3");
    json["quantization_config"] = quantization;
    return message_of<Unsupported>([&] { parse(json); });
  };
  EXPECT_THAT(complaint(int4({{"num_bits", 8}})), HasSubstr("group_0.weights.num_bits = 8: expected 4"));
  EXPECT_THAT(complaint(int4({{"symmetric", false}})), HasSubstr("weights.symmetric = false"));
  EXPECT_THAT(complaint(int4({{"type", "float"}})), HasSubstr("weights.type = \"float\""));
  EXPECT_THAT(complaint(int4({{"actorder", "group"}})), HasSubstr("weights.actorder"));
  EXPECT_THAT(complaint(int4({{"strategy", "block"}})), HasSubstr("weights.strategy"));
  EXPECT_THAT(complaint(int4({{"twist", 1}})), HasSubstr("weights.twist = 1"));
  Json other = int4();
  other["format"] = "nvfp4-pack-quantized";
  EXPECT_THAT(complaint(other), HasSubstr("quantization_config.format"));
  other = int4();
  other["config_groups"]["group_1"] = int4({{"group_size", 32}})["config_groups"]["group_0"];
  EXPECT_THAT(complaint(other), HasSubstr("groups of weights of one size"));
  other = int4();
  other["transform_config"] = {{"R1", 1}};
  EXPECT_THAT(complaint(other), HasSubstr("quantization_config.transform_config"));
  Json fp8 = {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}, {"scale_fmt", "ue8m0"}};
  Json json = published("deepseek-v3");
  json["quantization_config"] = fp8;
  EXPECT_EQ(parse(json).stored, (StoredFormat{128, 128, 0}));
  fp8["scale_fmt"] = "log";
  EXPECT_THAT(complaint(fp8), HasSubstr("quantization_config.scale_fmt = \"log\""));
  fp8["scale_fmt"] = "ue8m0";
  fp8["rotation"] = true;
  EXPECT_THAT(complaint(fp8), HasSubstr("quantization_config.rotation = true"));
}

TEST(Config, NotJson) {
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_config("{", "a.json"); }),
              HasSubstr("a.json: not valid JSON"));
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_config("[]", "a.json"); }),
              HasSubstr("a.json: top level = []"));
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_config(R"({"a": 1e999})", "a.json"); }),
              HasSubstr("a.json"));
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_config(R"({"a": 1, "a": 2})", "a.json"); }),
              HasSubstr("\"a\" is there twice"));
  EXPECT_THAT(message_of<InvalidArgument>([] { parse_config(std::string(100000, '['), "a.json"); }),
              HasSubstr("nested"));
}

TEST(SamplingDefaults, OfGenerationConfig) {
  const TemporaryDirectory directory;
  EXPECT_FALSE(read_sampling_defaults(directory.path()).temperature);
  directory.write("generation_config.json",
                  R"({"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": -1})");
  const SamplingDefaults defaults = read_sampling_defaults(directory.path());
  EXPECT_EQ(defaults.temperature, 0.6);
  EXPECT_EQ(defaults.top_p, 0.95);
  EXPECT_EQ(defaults.top_k, 0);
  EXPECT_FALSE(defaults.min_p);
  EXPECT_FALSE(defaults.repetition_penalty);
  directory.write("generation_config.json", R"({"temperature": -1})");
  EXPECT_THAT(message_of<InvalidArgument>([&] { read_sampling_defaults(directory.path()); }),
              HasSubstr("generation_config.json: temperature = -1: expected a number from 0 to 1000"));
}

}  // namespace
}  // namespace flash_mla::checkpoint
