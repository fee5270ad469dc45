#include "base/processors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "temporary_directory.h"

namespace flash_mla {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

/// A machine whose /proc and /sys are files of a folder.
class Machine : public ::testing::Test {
 protected:
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((directory_.path() / path).parent_path());
    directory_.write(path, text);
  }
  Processors read() const { return read_processors(directory_.path()); }
  TemporaryDirectory directory_;
};

TEST_F(Machine, NothingThereIsNoQuota) {
  EXPECT_EQ(read().quota, 0);
  EXPECT_GE(read().usable, 1);
}

TEST_F(Machine, TheLowestQuotaOfTheGroupsCounts) {
  write("proc/self/cgroup", "0::/user.slice/job\n");
  write("sys/fs/cgroup/user.slice/job/cpu.max", "max 100000\n");
  EXPECT_EQ(read().quota, 0);
  write("sys/fs/cgroup/user.slice/cpu.max", "150000 100000\n");
  EXPECT_EQ(read().quota, 1.5);
  EXPECT_THAT(read().quota_file, EndsWith("user.slice/cpu.max"));
  write("sys/fs/cgroup/user.slice/job/cpu.max", "50000 100000\n");
  EXPECT_EQ(read().quota, 0.5);
}

TEST_F(Machine, AContainersGroupIsMountedAsTheRoot) {
  write("proc/self/cgroup", "0::/\n");
  write("sys/fs/cgroup/cpu.max", "200000 50000\n");
  EXPECT_EQ(read().quota, 4);
  write("proc/self/cgroup", "0::/the/hosts/path/of/it\n");
  EXPECT_EQ(read().quota, 4);
  write("proc/self/cgroup", "0::/../elsewhere\n");
  EXPECT_EQ(read().quota, 4);
}

TEST_F(Machine, TheFirstVersionsQuota) {
  write("proc/self/cgroup", "4:memory:/m\n3:cpu,cpuacct:/box\n0::/\n");
  write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "-1\n");
  write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(read().quota, 0);
  write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "250000\n");
  EXPECT_EQ(read().quota, 2.5);
}

TEST_F(Machine, Load) {
  write("proc/loadavg", "3.25 2.00 1.00 4/300 1234\n");
  EXPECT_EQ(read().load, 3.25);
}

TEST(Threading, SleepsWhereProcessorsAreShared) {
  Processors p;
  p.online = p.usable = 16;
  Threading alone = choose_threading(p);
  EXPECT_EQ(alone.threads, 16);
  EXPECT_EQ(alone.waiting, Waiting::kSpin);
  p.load = 8;
  EXPECT_EQ(choose_threading(p).waiting, Waiting::kSleep);
  EXPECT_THAT(choose_threading(p).why_waiting, HasSubstr("a load of 8.0 on 16"));
  p.load = 0;
  p.usable = 4;
  EXPECT_EQ(choose_threading(p).threads, 4);
  EXPECT_EQ(choose_threading(p).waiting, Waiting::kSleep);
}

TEST(Threading, KeepsToTheQuota) {
  Processors p;
  p.online = p.usable = 16;
  p.quota_file = "/sys/fs/cgroup/cpu.max";
  for (const auto& [quota, threads] :
       {std::pair{0.2, 1}, {1.0, 1}, {1.5, 2}, {4.0, 4}, {15.5, 16}, {64.0, 16}}) {
    p.quota = quota;
    EXPECT_EQ(choose_threading(p).threads, threads) << quota;
    EXPECT_EQ(choose_threading(p).waiting == Waiting::kSleep, quota < 16) << quota;
  }
  p.quota = 1.5;
  EXPECT_THAT(choose_threading(p).why_threads, HasSubstr("/sys/fs/cgroup/cpu.max allows 1.5"));
}

TEST(Threading, TheUsersEnvironmentComesFirst) {
  setenv("OMP_NUM_THREADS", "3", 1);
  setenv("OMP_WAIT_POLICY", "active", 1);
  const Threading t = with_environment(choose_threading({}));
  unsetenv("OMP_NUM_THREADS");
  unsetenv("OMP_WAIT_POLICY");
  EXPECT_EQ(t.threads, 3);
  EXPECT_EQ(t.waiting, Waiting::kEnvironment);
  EXPECT_EQ(t.why_waiting, "OMP_WAIT_POLICY=active");
}

}  // namespace
}  // namespace flash_mla
