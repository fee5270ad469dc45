// The program as its users run it: the documented examples, exit codes, pictures' absence of matplotlib.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Output {
  int code;
  std::string text;
};

Output run(const std::string& arguments, bool errors) {
  const std::string command = std::string("'") + FLASH_MLA_PROGRAM + "' " + arguments +
                              (errors ? " 2>&1 >/dev/null" : " 2>/dev/null");
  FILE* pipe = popen(command.c_str(), "r");
  Output out{-1, ""};
  char buffer[4096];
  for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.text.append(buffer, n);
  const int status = pclose(pipe);
  if (WIFEXITED(status)) out.code = WEXITSTATUS(status);
  return out;
}

// A fenced block that starts with "$ flash-mla ..." is a command and its whole output.
TEST(PlanDocumentation, ExamplesPrintWhatThePageShows) {
  std::ifstream file(FLASH_MLA_PLANNER_DOC);
  ASSERT_TRUE(file) << FLASH_MLA_PLANNER_DOC;
  std::string line, command, expected;
  bool inside = false;
  int examples = 0;
  while (std::getline(file, line)) {
    if (line.starts_with("```")) {
      if (inside && !command.empty()) {
        SCOPED_TRACE(command);
        EXPECT_EQ(run(command, false).text, expected);
        ++examples;
      }
      inside = !inside;
      command.clear();
      expected.clear();
    } else if (inside && command.empty() && expected.empty() && line.starts_with("$ flash-mla ")) {
      command = line.substr(std::string("$ flash-mla ").size());
    } else if (inside && !command.empty()) {
      expected += line + "\n";
    }
  }
  EXPECT_GE(examples, 3);
}

TEST(PlanProgram, ExitCodes) {
  EXPECT_EQ(run("plan --ep 16", false).code, 0);
  for (const char* wrong :
       {"plan --batch 0", "plan --ep 3", "plan --tp 256", "plan --model nothing", "plan --sweep ep",
        "plan --sweep ep=8..4", "plan --set speed=1", "plan compare", "plan --ep 16 compare --case ep=8",
        "plan --request /nowhere.json", "plan calibrate --bench /nowhere.json", "plan --format xml"}) {
    const Output out = run(wrong, true);
    EXPECT_EQ(out.code, 2) << wrong;
    EXPECT_FALSE(out.text.empty()) << wrong;
    EXPECT_EQ(out.text.find("terminate"), std::string::npos) << out.text;
  }
  const Output big = run("plan --ep 1", true);
  EXPECT_EQ(big.code, 1);
  EXPECT_NE(big.text.find("does not fit"), std::string::npos) << big.text;
  EXPECT_EQ(run("plan --sweep ep=16,32 --slo-tpot-ms 0.001", false).code, 1);
}

TEST(PlanProgram, SweepRanges) {
  auto lines = [](const std::string& arguments) {
    const std::string text = run(arguments + " --format csv", false).text;
    return std::count(text.begin(), text.end(), '\n') - 1;
  };
  EXPECT_EQ(lines("plan --sweep ep=16,32 batch=1..8"), 16);
  EXPECT_EQ(lines("plan --ep 16 --sweep batch=1..128*2"), 8);
  EXPECT_EQ(lines("plan --ep 16 --sweep input=1000..3000+500"), 5);
}

TEST(PlanProgram, CalibratedProfileIsAHardwareFile) {
  const std::string path = testing::TempDir() + "h200_measured.json";
  EXPECT_EQ(run("plan calibrate --bench h200_dense_decode -o " + path, false).code, 0);
  const Output peak = run("plan --hardware h200 --ep 16 --format csv", false);
  const Output measured = run("plan --hardware " + path + " --ep 16 --format csv", false);
  EXPECT_EQ(measured.code, 0);
  EXPECT_NE(measured.text, peak.text);
  std::remove(path.c_str());
}

TEST(PlanProgram, MissingMatplotlibIsSaid) {
  const std::string directory = testing::TempDir() + "planner_pictures";
  const Output none = run("plan --ep 16 --python /nowhere/python --plot " + directory, true);
  EXPECT_EQ(none.code, 2);
  EXPECT_NE(none.text.find("/nowhere/python"), std::string::npos) << none.text;
  // `false` runs, but cannot import anything.
  const Output without = run("plan --ep 16 --python false --plot " + directory, true);
  EXPECT_EQ(without.code, 2);
  EXPECT_NE(without.text.find("matplotlib"), std::string::npos) << without.text;
}

}  // namespace
