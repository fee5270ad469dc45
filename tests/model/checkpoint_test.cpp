#include "checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "checkpoint/convert.h"
#include "checkpoint/safetensors.h"
#include "flash_mla/error.h"
#include "safetensors_file.h"
#include "temporary_directory.h"

namespace flash_mla::checkpoint {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Checkpoint open(const TemporaryDirectory& dir) { return Checkpoint::open(dir.path()); }

TEST(Checkpoint, EveryDtype) {
  const TemporaryDirectory dir;
  SafetensorsFile file;
  file.add<float>("f32", "F32", {1, 3}, {1.5f, -0.0f, 1e-40f});
  file.add<std::uint16_t>("f16", "F16", {1, 4}, {0x3c00, 0xc000, 0x0001, 0x7bff});
  file.add<std::uint16_t>("bf16", "BF16", {2, 2}, {0x3f80, 0xbf80, 0x4049, 0x0001});
  file.add<std::uint8_t>("fp8", "F8_E4M3", {1, 4}, {0x38, 0xb8, 0x01, 0x7e});
  file.add<float>("fp8_scale_inv", "F32", {1, 1}, {2.0f});
  file.add<std::int64_t>("counter", "I64", {}, {7});
  dir.write("model.safetensors", file.bytes());
  const Checkpoint c = open(dir);
  EXPECT_THAT(c.names(), ElementsAre("bf16", "counter", "f16", "f32", "fp8", "fp8_scale_inv"));
  EXPECT_TRUE(c.contains("f16"));
  EXPECT_FALSE(c.contains("f17"));

  float x[4];
  c.read_float32("f32", 1, 3, {0, 0}, x);
  EXPECT_EQ(x[0], 1.5f);
  EXPECT_TRUE(std::signbit(x[1]));
  EXPECT_EQ(x[2], 1e-40f);
  c.read_float32("f16", 1, 4, {0, 0}, x);
  EXPECT_THAT(x, ElementsAre(1.0f, -2.0f, 0x1p-24f, 65504.0f));
  c.read_float32("bf16", 2, 2, {0, 0}, x);
  EXPECT_THAT(x, ElementsAre(1.0f, -1.0f, 3.140625f, std::ldexp(1.0f, -133)));
  c.read_float32("fp8", 1, 4, {128, 128}, x);
  EXPECT_THAT(x, ElementsAre(2.0f, -2.0f, 2 * 0x1p-9f, 896.0f));

  EXPECT_EQ(c.get("bf16", {2, 2}).type, WeightType::kBFloat16);
  EXPECT_EQ(c.get("fp8").elements(), 4);
  EXPECT_THAT(message_of<InvalidArgument>([&] { c.get("counter"); }),
              AllOf(HasSubstr("model.safetensors: tensor \"counter\""), HasSubstr("dtype = I64")));
}

TEST(Checkpoint, SpecialValues) {
  const std::vector<std::uint16_t> half = {0x7c00, 0xfc00, 0x7e01, 0x8000, 0x03ff};
  float x[5];
  to_float32({WeightType::kFloat16, {5}, reinterpret_cast<const std::byte*>(half.data())}, x);
  EXPECT_EQ(x[0], INFINITY);
  EXPECT_EQ(x[1], -INFINITY);
  EXPECT_TRUE(std::isnan(x[2]));
  EXPECT_TRUE(x[3] == 0 && std::signbit(x[3]));
  EXPECT_EQ(x[4], 1023 * 0x1p-24f);
  const std::vector<std::uint8_t> fp8 = {0x7f, 0xff, 0x80, 0x07, 0x08};
  to_float32({WeightType::kFloat8E4M3, {5}, reinterpret_cast<const std::byte*>(fp8.data())}, x);
  EXPECT_TRUE(std::isnan(x[0]));
  EXPECT_TRUE(std::isnan(x[1]));
  EXPECT_TRUE(x[2] == 0 && std::signbit(x[2]));
  EXPECT_EQ(x[3], 7 * 0x1p-9f);
  EXPECT_EQ(x[4], 0x1p-6f);
}

TEST(Checkpoint, BlockScalesWithPartialBlocks) {
  // 5 x 7 in blocks of 2 x 3: 3 x 3 scales, the last row and column of blocks cut off.
  const TemporaryDirectory dir;
  std::vector<std::uint8_t> ones(35, 0x38);
  std::vector<float> scales = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  dir.write("model.safetensors", SafetensorsFile()
                                     .add("w.weight", "F8_E4M3", {5, 7}, ones)
                                     .add("w.weight_scale_inv", "F32", {3, 3}, scales)
                                     .bytes());
  const Checkpoint c = open(dir);
  std::vector<float> x(35);
  c.read_float32("w.weight", 5, 7, {2, 3}, x.data());
  for (std::size_t row = 0; row < 5; ++row) {
    for (std::size_t column = 0; column < 7; ++column) {
      EXPECT_EQ(x[row * 7 + column], scales[row / 2 * 3 + column / 3]) << row << ", " << column;
    }
  }
  EXPECT_THAT(message_of<InvalidArgument>([&] {
                c.read_float32("w.weight", 5, 7, {2, 2}, x.data());
              }),
              AllOf(HasSubstr("tensor \"w.weight_scale_inv\""), HasSubstr("[3, 3]: expected [3, 4]")));
  EXPECT_THAT(message_of<InvalidArgument>([&] {
                c.read_float32("w.weight", 5, 7, {0, 0}, x.data());
              }),
              AllOf(HasSubstr("\"w.weight\""), HasSubstr("weight_block_size")));
}

TEST(Checkpoint, ScalesThatArePowersOfTwo) {
  const TemporaryDirectory dir;
  dir.write("model.safetensors",
            SafetensorsFile()
                .add<std::uint8_t>("w.weight", "F8_E4M3", {2, 2}, {0x38, 0x38, 0x38, 0xb8})
                .add<std::uint8_t>("w.weight_scale_inv", "F8_E8M0", {1, 2}, {127, 130})
                .bytes());
  const Checkpoint c = open(dir);
  float x[4];
  c.read_float32("w.weight", 2, 2, {2, 1}, x);
  EXPECT_THAT(x, ElementsAre(1.0f, 8.0f, 1.0f, -8.0f));
  std::uint8_t codes[4];
  float scales[4];
  ASSERT_EQ(c.quantized_format("w.weight", 2, 2, {2, 1}), (QuantizedFormat{QuantizedType::kE4m3, 1}));
  c.read_quantized("w.weight", 2, 2, {2, 1}, codes, scales);
  EXPECT_THAT(codes, ElementsAre(0x38, 0x38, 0x38, 0xb8));
  EXPECT_THAT(scales, ElementsAre(1.0f, 8.0f, 1.0f, 8.0f));
}

TEST(Checkpoint, ScalesMustBePositiveNumbers) {
  for (const float bad : {0.0f, -1.0f, INFINITY, NAN}) {
    const TemporaryDirectory dir;
    dir.write("model.safetensors", SafetensorsFile()
                                       .add<std::uint8_t>("w.weight", "F8_E4M3", {2, 2}, {1, 2, 3, 4})
                                       .add<float>("w.weight_scale_inv", "F32", {2, 1}, {1, bad})
                                       .bytes());
    const Checkpoint c = open(dir);
    float x[4];
    EXPECT_THAT(message_of<InvalidArgument>([&] {
                  c.read_float32("w.weight", 2, 2, {1, 2}, x);
                }),
                AllOf(HasSubstr("tensor \"w.weight_scale_inv\""), HasSubstr("at row 1, column 0")));
  }
}

/// 2 x 11 weights of 4 bits in groups of 4, as compressed-tensors packs them.
struct PackedFile {
  std::vector<std::int32_t> words = {0, 0, 0, 0};
  std::vector<std::uint16_t> scales = {0x3f80, 0x4000, 0x4080, 0x3f00, 0x3f80, 0x3e80};  // 1 2 4 0.5 1 0.25
  std::vector<std::int64_t> size = {2, 11};

  static int value(std::int64_t row, std::int64_t column) {
    return static_cast<int>((row * 11 + column) * 7 % 16) - 8;
  }
  PackedFile() {
    for (std::int64_t row = 0; row < 2; ++row) {
      for (std::int64_t column = 0; column < 11; ++column) {
        const auto code = static_cast<std::uint32_t>(value(row, column) + 8);
        auto& word = words[static_cast<std::size_t>(row * 2 + column / 8)];
        word = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) | code << (column % 8 * 4));
      }
    }
  }
  /// Without the tensor that is called `left_out`.
  SafetensorsFile file(const std::string& left_out = "") const {
    SafetensorsFile out;
    if (left_out != "w.weight_packed") out.add("w.weight_packed", "I32", {2, 2}, words);
    if (left_out != "w.weight_scale") out.add("w.weight_scale", "BF16", {2, 3}, scales);
    if (left_out != "w.weight_shape") out.add("w.weight_shape", "I64", {2}, size);
    return out;
  }
};

TEST(Checkpoint, WeightsOf4Bits) {
  const TemporaryDirectory dir;
  dir.write("model.safetensors", PackedFile().file().bytes());
  const Checkpoint c = open(dir);
  const StoredFormat format{0, 0, 4};
  const float scale[2][3] = {{1, 2, 4}, {0.5f, 1, 0.25f}};
  float x[22], scales[6];
  std::uint16_t narrow[22];
  std::uint8_t codes[22];
  c.read_float32("w.weight", 2, 11, format, x);
  c.read_bfloat16("w.weight", 2, 11, format, narrow);
  ASSERT_EQ(c.quantized_format("w.weight", 2, 11, format), (QuantizedFormat{QuantizedType::kInt4, 4}));
  c.read_quantized("w.weight", 2, 11, format, codes, scales);
  for (std::int64_t row = 0; row < 2; ++row) {
    for (std::int64_t column = 0; column < 11; ++column) {
      const std::int64_t i = row * 11 + column;
      const int value = PackedFile::value(row, column);
      EXPECT_EQ(x[i], static_cast<float>(value) * scale[row][column / 4]) << i;
      EXPECT_EQ(std::bit_cast<float>(static_cast<std::uint32_t>(narrow[i]) << 16), x[i]) << i;
      EXPECT_EQ(codes[i], value + 8) << i;
    }
  }
  EXPECT_THAT(scales, ElementsAre(1, 2, 4, 0.5f, 1, 0.25f));
  EXPECT_THAT(message_of<InvalidArgument>([&] { c.read_float32("w.weight", 2, 11, {}, x); }),
              AllOf(HasSubstr("tensor \"w.weight_packed\""), HasSubstr("compressed-tensors")));
}

TEST(Checkpoint, BrokenWeightsOf4Bits) {
  const auto complaint = [](const SafetensorsFile& file, std::int64_t rows = 2) {
    const TemporaryDirectory dir;
    dir.write("model.safetensors", file.bytes());
    const Checkpoint c = open(dir);
    return message_of<InvalidArgument>([&] {
      std::vector<float> x(100);
      c.read_float32("w.weight", rows, 11, {0, 0, 4}, x.data());
    });
  };
  PackedFile good;
  EXPECT_THAT(complaint(good.file(), 3),
              AllOf(HasSubstr("w.weight_shape"), HasSubstr("2, 11: expected 3, 11")));
  PackedFile nan = good;
  nan.scales[4] = 0x7fc0;
  EXPECT_THAT(complaint(nan.file()), AllOf(HasSubstr("w.weight_scale"), HasSubstr("nan at row 1, column 1")));
  nan.scales[4] = 0;
  EXPECT_THAT(complaint(nan.file()), AllOf(HasSubstr("w.weight_scale"), HasSubstr("0 at row 1, column 1")));
  EXPECT_THAT(complaint(good.file().add<std::int32_t>("w.weight_zero_point", "I32", {1}, {0})),
              AllOf(HasSubstr("w.weight_zero_point"), HasSubstr("symmetric")));
  EXPECT_THAT(complaint(good.file().add<std::int32_t>("w.weight_g_idx", "I32", {1}, {0})),
              HasSubstr("w.weight_g_idx"));
  const auto with = [&](const std::string& name, const std::string& dtype, std::vector<std::int64_t> shape,
                        std::size_t bytes) {
    return complaint(good.file(name).add(name, dtype, std::move(shape), std::string(bytes, '\1')));
  };
  EXPECT_THAT(with("w.weight_scale", "F32", {2, 2}, 16), HasSubstr("shape = [2, 2]: expected [2, 3]"));
  EXPECT_THAT(with("w.weight_scale", "I8", {2, 3}, 6), HasSubstr("dtype = I8"));
  EXPECT_THAT(with("w.weight_packed", "I64", {2, 2}, 32), HasSubstr("dtype = I64: expected I32"));
  EXPECT_THAT(with("w.weight_packed", "I32", {2, 3}, 24), HasSubstr("shape = [2, 3]: expected [2, 2]"));
  EXPECT_THAT(with("w.weight_shape", "F32", {2}, 8), HasSubstr("dtype = F32"));
  for (const std::string missing : {"w.weight_scale", "w.weight_shape"}) {
    EXPECT_THAT(complaint(good.file(missing)), HasSubstr("no tensor \"" + missing));
  }
}

// Large enough for several threads.
TEST(Checkpoint, Bfloat16IsThatOfFloat32Rounded) {
  constexpr std::int64_t kRows = 700, kColumns = 513;
  const TemporaryDirectory dir;
  std::mt19937 random(1);
  std::vector<float> f32(kRows * kColumns), scales(6 * 5);
  std::vector<std::uint16_t> f16(f32.size()), bf16(f32.size());
  std::vector<std::uint8_t> fp8(f32.size());
  for (std::size_t i = 0; i < f32.size(); ++i) {
    f32[i] = std::ldexp(static_cast<float>(random()) * 0x1p-31f - 1, static_cast<int>(random() % 40) - 20);
    f16[i] = static_cast<std::uint16_t>(random() & 0xbbff);
    bf16[i] = static_cast<std::uint16_t>(random() & 0xbfff);
    fp8[i] = static_cast<std::uint8_t>(random() % 127 + random() % 2 * 128);
  }
  for (float& x : scales) x = static_cast<float>(random()) * 0x1p-34f;
  f32[0] = std::bit_cast<float>(0x3f808000u);  // halfway, to even: down
  f32[1] = std::bit_cast<float>(0x3f818000u);  // up
  dir.write("model.safetensors", SafetensorsFile()
                                     .add("f32", "F32", {kRows, kColumns}, f32)
                                     .add("f16", "F16", {kRows, kColumns}, f16)
                                     .add("bf16", "BF16", {kRows, kColumns}, bf16)
                                     .add("fp8", "F8_E4M3", {kRows, kColumns}, fp8)
                                     .add("fp8_scale_inv", "F32", {6, 5}, scales)
                                     .bytes());
  const Checkpoint c = open(dir);
  std::vector<std::uint16_t> out(f32.size());
  std::vector<float> values(f32.size());
  for (const char* name : {"f32", "f16", "bf16", "fp8"}) {
    SCOPED_TRACE(name);
    c.read_float32(name, kRows, kColumns, {128, 128}, values.data());
    c.read_bfloat16(name, kRows, kColumns, {128, 128}, out.data());
    for (std::size_t i = 0; i < out.size(); ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(values[i]);
      ASSERT_EQ(out[i], (bits + 0x7fff + ((bits >> 16) & 1)) >> 16) << i;
    }
  }
  c.read_bfloat16("bf16", kRows, kColumns, {0, 0}, out.data());
  EXPECT_EQ(out, bf16);
  c.read_float32("f32", kRows, kColumns, {0, 0}, values.data());
  EXPECT_EQ(values, f32);
}

TEST(Checkpoint, Fp8WithoutScales) {
  const TemporaryDirectory dir;
  dir.write("model.safetensors", SafetensorsFile().add<std::uint8_t>("w", "F8_E4M3", {1, 1}, {0x38}).bytes());
  const Checkpoint c = open(dir);
  float x;
  EXPECT_THAT(message_of<InvalidArgument>([&] {
                c.read_float32("w", 1, 1, {128, 128}, &x);
              }),
              HasSubstr("no tensor \"w_scale_inv\""));
}

TEST(Checkpoint, ShapesAreChecked) {
  const TemporaryDirectory dir;
  dir.write("model.safetensors", SafetensorsFile()
                                     .add<float>("w", "F32", {2, 3}, {0, 1, 2, 3, 4, 5})
                                     .add<float>("norm", "F32", {2}, {1, 2})
                                     .bytes());
  const Checkpoint c = open(dir);
  float x[6];
  c.read_float32("norm", 1, 2, {0, 0}, x);
  EXPECT_EQ(x[1], 2.0f);
  for (const auto& call : {std::function<void()>([&] {
                             c.get("w", {3, 2});
                           }),
                           std::function<void()>([&] {
                             c.read_float32("w", 3, 2, {0, 0}, x);
                           })}) {
    EXPECT_THAT(
        message_of<InvalidArgument>(call),
        AllOf(HasSubstr("tensor \"w\": shape = [2, 3]: expected [3, 2]"), HasSubstr("model.safetensors")));
  }
  EXPECT_THAT(message_of<InvalidArgument>([&] { c.get("v", {3, 2}); }), HasSubstr("no tensor \"v\""));
}

TEST(Checkpoint, UnalignedDataIsCopied) {
  // An odd header puts the floats at an odd address.
  const TemporaryDirectory dir;
  const float value = 1.25f;
  const std::string data(reinterpret_cast<const char*>(&value), 4);
  for (const std::string spaces : {"", " ", "  ", "   "}) {
    const std::string header = R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})" + spaces;
    dir.write("model.safetensors", safetensors_bytes(header, data));
    const Checkpoint c = open(dir);
    const WeightView view = c.get("w", {1});
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data) % alignof(float), 0u);
    EXPECT_EQ(std::memcmp(view.data, &value, 4), 0);
    EXPECT_EQ(c.get("w").data, view.data);
  }
}

TEST(Checkpoint, EmptyTensorsAndNoTensors) {
  const TemporaryDirectory dir;
  dir.write("model.safetensors", SafetensorsFile().add("e", "F32", {0, 5}, std::string()).bytes());
  EXPECT_EQ(open(dir).get("e", {0, 5}).elements(), 0);
  dir.write("model.safetensors", safetensors_bytes("{}", ""));
  EXPECT_TRUE(open(dir).names().empty());
}

TEST(Checkpoint, Metadata) {
  const TemporaryDirectory dir;
  dir.write("model.safetensors", safetensors_bytes(R"({"__metadata__":{"format":"pt"}})", ""));
  EXPECT_TRUE(open(dir).names().empty());
}

// ---------------------------------------------------------------------------------------- broken files

std::string entry(const std::string& fields) { return R"({"w":{)" + fields + "}}"; }

std::string parse_error(const std::string& bytes) {
  return message_of<InvalidArgument>([&] {
    parse_safetensors({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, "a.safetensors");
  });
}

TEST(BrokenSafetensors, Truncated) {
  const std::string whole =
      SafetensorsFile().add<float>("w", "F32", {2}, {1, 2}).add<float>("x", "F32", {1}, {3}).bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THAT(parse_error(whole.substr(0, size)), HasSubstr("a.safetensors: ")) << size;
  }
  EXPECT_THAT(parse_error(whole.substr(0, 5)), HasSubstr("the file has 5 bytes"));
  EXPECT_THAT(parse_error(whole.substr(0, 20)), HasSubstr("header length"));
  EXPECT_THAT(parse_error(whole.substr(0, whole.size() - 1)),
              HasSubstr("tensor \"x\": data_offsets = [8,12]"));
  EXPECT_THAT(parse_error(whole + "z"), HasSubstr("13 bytes follow the header, 12 belong to tensors"));
}

TEST(BrokenSafetensors, OversizedHeaderLength) {
  EXPECT_THAT(parse_error(std::string(8, '\xff') + "{}"), HasSubstr("header length = 18446744073709551615"));
  EXPECT_THAT(parse_error(std::string("\x03\0\0\0\0\0\0\0", 8) + "{}"),
              HasSubstr("header length = 3: expected at most 2"));
}

TEST(BrokenSafetensors, OverlapsAndGaps) {
  const auto two = [](const std::string& a, const std::string& b) {
    return parse_error(safetensors_bytes(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
                                             R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}",
                                         std::string(10, 'x')));
  };
  EXPECT_THAT(two("[0,4]", "[2,6]"), HasSubstr("tensor \"b\" begins at byte 2, inside tensor \"a\""));
  EXPECT_THAT(two("[0,4]", "[0,4]"), HasSubstr("tensor \"b\" begins at byte 0, inside tensor \"a\""));
  EXPECT_THAT(two("[0,4]", "[6,10]"), HasSubstr("tensor \"b\" begins at byte 6, apart from tensor \"a\""));
  EXPECT_THAT(two("[6,10]", "[2,6]"), HasSubstr("tensor \"b\" begins at byte 2, apart from the header"));
}

TEST(BrokenSafetensors, Entries) {
  const auto one = [](const std::string& fields) {
    return parse_error(safetensors_bytes(entry(fields), std::string(8, 'x')));
  };
  EXPECT_THAT(one(R"("shape":[2],"data_offsets":[0,8])"),
              HasSubstr("a.safetensors: tensor \"w\": dtype is missing"));
  EXPECT_THAT(one(R"("dtype":"Q4","shape":[2],"data_offsets":[0,8])"),
              HasSubstr("tensor \"w\": dtype = \"Q4\""));
  EXPECT_THAT(one(R"("dtype":7,"shape":[2],"data_offsets":[0,8])"), HasSubstr("tensor \"w\": dtype = 7"));
  EXPECT_THAT(one(R"("dtype":"F32","data_offsets":[0,8])"), HasSubstr("shape is missing"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), HasSubstr("shape = [-2]"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), HasSubstr("shape = [2.0]"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"),
              HasSubstr("data_offsets = [0,8]: expected 12 bytes, the size of shape [3] in F32"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"),
              HasSubstr("2^59"));
  EXPECT_THAT(one(R"("dtype":"F64","shape":[576460752303423488],"data_offsets":[0,8])"), HasSubstr("2^61"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), HasSubstr("begin <= end"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,9])"), HasSubstr("an end of at most 8"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615])"),
              HasSubstr("an end of at most 8"));
  EXPECT_THAT(one(R"("dtype":"F32","shape":[2],"data_offsets":[8])"), HasSubstr("[begin, end]"));
  EXPECT_THAT(one(R"("dtype":"F4","shape":[15],"data_offsets":[0,8])"), HasSubstr("whole number of bytes"));
}

TEST(BrokenSafetensors, Headers) {
  const auto header = [](const std::string& text) { return parse_error(safetensors_bytes(text, "")); };
  EXPECT_THAT(header(""), HasSubstr("a.safetensors: header: not valid JSON"));
  EXPECT_THAT(header("[]"), HasSubstr("header = []: expected a JSON object"));
  EXPECT_THAT(header("{\"\xff\":1}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(header(R"({"w":3})"), HasSubstr("tensor \"w\" = 3: expected a JSON object"));
  const std::string w = R"("w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  EXPECT_THAT(header("{" + w + "," + w + "}"), HasSubstr("\"w\" is there twice"));
}

// ---------------------------------------------------------------------------------------- shards

const std::string kIndex = "model.safetensors.index.json";

void write_shards(const TemporaryDirectory& dir) {
  dir.write("one.safetensors", SafetensorsFile().add<float>("a", "F32", {1}, {1}).bytes());
  dir.write("two.safetensors",
            SafetensorsFile().add<float>("b", "F32", {1}, {2}).add<float>("extra", "F32", {1}, {3}).bytes());
  dir.write(kIndex,
            R"({"metadata":{"total_size":8},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
}

TEST(Shards, AreRead) {
  const TemporaryDirectory dir;
  write_shards(dir);
  const Checkpoint c = open(dir);
  EXPECT_THAT(c.names(), ElementsAre("a", "b"));
  float x;
  c.read_float32("b", 1, 1, {0, 0}, &x);
  EXPECT_EQ(x, 2.0f);
}

TEST(Shards, MissingFile) {
  const TemporaryDirectory dir;
  write_shards(dir);
  std::filesystem::remove(dir.path() / "two.safetensors");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
              AllOf(HasSubstr("two.safetensors"), HasSubstr("\"b\"")));
}

TEST(Shards, TensorMissingOrElsewhere) {
  const TemporaryDirectory dir;
  write_shards(dir);
  dir.write(kIndex, R"({"weight_map":{"a":"one.safetensors","c":"two.safetensors"}})");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
              HasSubstr("two.safetensors: has no tensor \"c\""));
  dir.write(kIndex,
            R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors","extra":"two.safetensors"}})");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
              HasSubstr("one.safetensors: has no tensor \"b\""));
}

TEST(Shards, TensorInTwoFiles) {
  const TemporaryDirectory dir;
  write_shards(dir);
  dir.write("one.safetensors",
            SafetensorsFile().add<float>("a", "F32", {1}, {1}).add<float>("b", "F32", {1}, {1}).bytes());
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
              AllOf(HasSubstr("tensor \"b\" is also in"), HasSubstr("one.safetensors"),
                    HasSubstr("two.safetensors")));
}

TEST(Shards, PathsOutOfTheFolder) {
  const TemporaryDirectory outside;
  outside.write("secret.safetensors", SafetensorsFile().add<float>("a", "F32", {1}, {1}).bytes());
  const std::string absolute = (outside.path() / "secret.safetensors").string();
  const std::string relative = "../" + outside.path().filename().string() + "/secret.safetensors";
  const TemporaryDirectory dir;
  for (const std::string& file : {absolute, relative, std::string(".."), std::string("."), std::string(""),
                                  std::string("sub/one.safetensors"), std::string("a\0b", 3)}) {
    dir.write(kIndex, Json{{"weight_map", {{"a", file}}}}.dump());
    EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
                AllOf(HasSubstr(kIndex), HasSubstr("tensor \"a\""), HasSubstr("in the same folder")))
        << file;
  }
  dir.write(kIndex, R"({"weight_map":{"a":7}})");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }), HasSubstr("file = 7"));
}

TEST(Shards, BrokenIndex) {
  const TemporaryDirectory dir;
  for (const char* index : {"", "[]", "{}", R"({"weight_map":[]})", R"({"weight_map":{}})"}) {
    dir.write(kIndex, index);
    EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }), HasSubstr(kIndex)) << index;
  }
}

TEST(Shards, BrokenShardIsNamed) {
  const TemporaryDirectory dir;
  write_shards(dir);
  dir.write("two.safetensors", "short");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
              HasSubstr("two.safetensors: the file has 5 bytes"));
  dir.write("two.safetensors", "");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }),
              HasSubstr("two.safetensors: the file has 0 bytes"));
}

TEST(Shards, NothingThere) {
  const TemporaryDirectory dir;
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }), HasSubstr("model.safetensors"));
  std::filesystem::create_directory(dir.path() / "model.safetensors");
  EXPECT_THAT(message_of<InvalidArgument>([&] { open(dir); }), HasSubstr("is not a regular file"));
}

TEST(Checkpoint, ALfsPointerIsNoCheckpoint) {
  const TemporaryDirectory directory;
  directory.write("model.safetensors",
                  "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4302350824\n");
  EXPECT_THAT(message_of<InvalidArgument>([&] { Checkpoint::open(directory.path()); }),
              HasSubstr("model.safetensors: a Git LFS pointer, not the file itself (4302350824 bytes)"));
}

}  // namespace
}  // namespace flash_mla::checkpoint
