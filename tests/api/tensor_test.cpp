#include <gtest/gtest.h>

#include <limits>

#include "flash_mla/dlpack.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

TEST(TensorView, RoundTripThroughDlpack) {
  float data[24];
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64,
                            DType::kInt32, DType::kInt64, DType::kUInt8}) {
    TensorView v = TensorView::contiguous(data, dtype, {2, 3, 4}, {DeviceType::kCuda, 1});
    v.strides[0] = 100;
    const TensorView w = from_dlpack(to_dlpack(v));
    EXPECT_EQ(w.data, v.data);
    EXPECT_EQ(w.dtype, v.dtype);
    EXPECT_EQ(w.device, v.device);
    EXPECT_EQ(w.rank, 3);
    EXPECT_EQ(w.shape, v.shape);
    EXPECT_EQ(w.strides, v.strides);
  }
}

TEST(TensorView, MissingStridesAreRowMajorAndOffsetsApply) {
  float data[10];
  std::int64_t shape[2] = {2, 3};
  DLTensor t{};
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = 2;
  t.dtype = {kDLFloat, 32, 1};
  t.shape = shape;
  t.byte_offset = 8;
  const TensorView v = from_dlpack(t);
  EXPECT_EQ(v.stride(0), 3);
  EXPECT_EQ(v.stride(1), 1);
  EXPECT_EQ(v.data, data + 2);
}

TEST(TensorView, WhatCannotBeUsedIsRefused) {
  float data[4];
  std::int64_t shape[6] = {2, 2, 1, 1, 1, 1};
  DLTensor t{};
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = 2;
  t.dtype = {kDLFloat, 32, 1};
  t.shape = shape;
  const auto refused = [](DLTensor x, const char* part) {
    try {
      from_dlpack(x, "thing");
      return false;
    } catch (const InvalidArgument& e) {
      return std::string(e.what()).find(part) != std::string::npos &&
             std::string(e.what()).find("thing") != std::string::npos;
    }
  };
  DLTensor x = t;
  x.ndim = 6;
  EXPECT_TRUE(refused(x, "rank 6"));
  x = t;
  x.ndim = -1;
  EXPECT_TRUE(refused(x, "rank -1"));
  x = t;
  x.dtype = {kDLComplex, 64, 1};
  EXPECT_TRUE(refused(x, "dtype"));
  x = t;
  x.dtype.lanes = 4;
  EXPECT_TRUE(refused(x, "lanes"));
  x = t;
  x.device.device_type = kDLVulkan;
  EXPECT_TRUE(refused(x, "device type"));
  x = t;
  x.shape = nullptr;
  EXPECT_TRUE(refused(x, "no shape"));
  std::int64_t negative[2] = {2, -1};
  x = t;
  x.shape = negative;
  EXPECT_TRUE(refused(x, "-1"));
  std::int64_t huge[2] = {std::numeric_limits<std::int64_t>::max() / 2, 8};
  x = t;
  x.shape = huge;
  EXPECT_TRUE(refused(x, "64-bit"));
}

TEST(TensorView, CountsThatDoNotFit) {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  EXPECT_THROW(TensorView::contiguous(nullptr, DType::kInt32, {kHuge, kHuge}), InvalidArgument);
  EXPECT_THROW(TensorView::contiguous(nullptr, DType::kInt32, {kHuge / 2}), InvalidArgument);
  EXPECT_EQ(TensorView::contiguous(nullptr, DType::kUInt8, {kHuge}).numel(), kHuge);
  EXPECT_EQ(TensorView::contiguous(nullptr, DType::kInt32, {kHuge, kHuge, 0}).numel(), 0);
  TensorView v = TensorView::contiguous(nullptr, DType::kInt32, {1, 1, 1});
  v.shape = {kHuge, kHuge, 2, 0, 0};
  EXPECT_EQ(v.numel(), kHuge);
  v.rank = 1000;  // by hand; only what is there is looked at
  EXPECT_EQ(v.numel(), 0);
  EXPECT_EQ(v.describe().substr(0, 7), "int32 (");
}

TEST(TensorView, ByteOffsetPastTheAddressSpace) {
  float data[4];
  std::int64_t shape[1] = {1};
  DLTensor t{};
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = 1;
  t.dtype = {kDLFloat, 32, 1};
  t.shape = shape;
  t.byte_offset = std::numeric_limits<std::uint64_t>::max() - 3;
  EXPECT_THROW(from_dlpack(t), InvalidArgument);
  t.byte_offset = 4;
  EXPECT_EQ(from_dlpack(t).data, data + 1);
}

TEST(TensorView, Describes) {
  EXPECT_EQ(TensorView::contiguous(nullptr, DType::kBFloat16, {2, 1}).describe(), "bfloat16 (2, 1) on cpu");
  EXPECT_EQ(TensorView::contiguous(nullptr, DType::kInt32, {3}, {DeviceType::kCuda, 2}).describe(),
            "int32 (3,) on cuda:2");
  EXPECT_EQ(TensorView{}.describe(), "(none)");
  EXPECT_THROW(TensorView::contiguous(nullptr, DType::kInt32, {-1}), InvalidArgument);
}

}  // namespace
}  // namespace flash_mla
