#include "model/size.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/json.h"
#include "checkpoint/config.h"
#include "flash_mla/error.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr double kGiB = 1 << 30;

checkpoint::ModelConfig v2_lite() {
  const std::string path = std::string(FLASH_MLA_MODELS) + "/deepseek-v2-lite.json";
  return checkpoint::parse_config(read_file(path), path);
}

TEST(Size, WeightsOfTheLayersAddUp) {
  const checkpoint::ModelConfig c = v2_lite();
  const double embedding = double{1} * c.vocab_size * c.hidden_size;
  EXPECT_EQ(num_weights_before(c, 0), embedding);
  EXPECT_GT(num_weights_before(c, 2), num_weights_before(c, 1));
  EXPECT_EQ(num_weights(c), num_weights_before(c, c.num_hidden_layers) + embedding);
  EXPECT_NEAR(num_weights(c), 15.7e9, 0.1e9);
}

TEST(Size, WhatDoesNotFitADeviceIsRefusedWithItsSizes) {
  const checkpoint::ModelConfig c = v2_lite();  // 29.2 GiB in bfloat16
  const auto refused = [&](int pages, double bytes, double free) {
    return message_of<OutOfMemory>([&] { check_fits_device(c, pages, bytes, {free * kGiB, 80 * kGiB}); });
  };
  EXPECT_THAT(refused(0, 0, 20), AllOf(HasSubstr("15.7 billion weights in bfloat16 are 29.2 GiB"),
                                       HasSubstr("a cache of one page 0.0 GiB"),
                                       HasSubstr("of 80.0 GiB there are 20.0 GiB free")));
  // A page: 64 tokens of 576 values of 2 bytes in 27 layers.
  EXPECT_EQ(page_bytes(c, DType::kBFloat16), 64.0 * 576 * 2 * 27);
  EXPECT_THAT(refused(10'000, 0, 40), HasSubstr("the cache that is asked for 18.5 GiB"));
  EXPECT_THAT(refused(0, 12 * kGiB, 40), HasSubstr("the cache that is asked for 12.0 GiB"));
  check_fits_device(c, 0, 0, {30 * kGiB, 80 * kGiB});
  check_fits_device(c, 10'000, 0, {50 * kGiB, 80 * kGiB});
}

}  // namespace
}  // namespace flash_mla::model
