// The program as its users run it: the documented examples, exit codes, pictures' absence of matplotlib.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <regex>
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

TEST(ExpertsProgram, PlansAHistogramThatThePlannerTakes) {
  const std::string file = testing::TempDir() + "flash_mla_experts.json";
  std::ofstream out(file);
  out << R"({"layers": [{"layer": 1, "counts": [9)";
  for (int e = 1; e < 256; ++e) out << ", 1";
  out << "]}]}";
  out.close();
  const Output plan = run("experts plan --histogram " + file + " --gpus 8 --copies 8", false);
  EXPECT_EQ(plan.code, 0);
  EXPECT_NE(plan.text.find("\"balancedness\""), std::string::npos) << plan.text;
  EXPECT_EQ(run("experts plan --histogram " + file + " --gpus 7", false).code, 2);
  EXPECT_NE(run("experts plan --histogram " + file + " --gpus 7", true).text.find("gpus = 7"),
            std::string::npos);
  EXPECT_EQ(run("experts plan --gpus 8 --histogram /no/such/file", false).code, 2);
  const std::string uniform = run("plan --model deepseek-v3 --ep 8 --format csv", false).text;
  const Output measured = run("plan --model deepseek-v3 --ep 8 --format csv --experts " + file, false);
  EXPECT_NE(measured.text, uniform);
  EXPECT_NE(run("plan --model deepseek-v3 --experts /no/such/file", true).text.find("/no/such/file"),
            std::string::npos);
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
  // Missed levels, however they are asked for.
  for (const char* missed : {"plan --ep 16 --slo-tpot-ms 0.001", "plan --sweep ep=16,32 --slo-tpot-ms 0.001",
                             "plan compare --slo-tpot-ms 0.001 --case ep=16",
                             "plan --users 8 --tokens-per-s 1000000", "plan --users 8 --slo-ttft-ms 0.001"}) {
    const Output out = run(missed, true);
    EXPECT_EQ(out.code, 1) << missed;
    EXPECT_FALSE(out.text.empty()) << missed;
  }
}

TEST(PlanProgram, UsersAreAnsweredInOneLineAndHowItIsStarted) {
  const Output out =
      run("plan --users 128 --tokens-per-s 50 --input 4096 --model deepseek-v3 --hardware h200", false);
  EXPECT_EQ(out.code, 0);
  EXPECT_LT(out.text.find("24 H200 SXM cards"), out.text.find('\n')) << out.text;
  EXPECT_NE(out.text.find("\n  decode: flash-mla serve cannot\n  ! dp 4 and prefill apart from decode"),
            std::string::npos)
      << out.text;
  EXPECT_NE(out.text.find("\n  prefill: flash-mla serve --model DIR --tp 8 --ep 8"), std::string::npos)
      << out.text;
  const Output one =
      run("plan --users 4 --tp 8 --ep 8 --input 4096 --model deepseek-v3 --hardware h200", false);
  EXPECT_NE(one.text.find("--role decode --peer HOST:PORT\n"), std::string::npos) << one.text;
  EXPECT_NE(one.text.find("--role prefill\n"), std::string::npos) << one.text;
  for (const char* wrong :
       {"plan --users 0", "plan --users many", "plan --users 1 --tokens-per-s -1", "plan --tokens-per-s 5",
        "plan --users 5 --sweep ep=8", "plan --users 5 --explain", "plan --users 5 --ep 3"}) {
    const Output refused = run(wrong, true);
    EXPECT_EQ(refused.code, 2) << wrong;
    EXPECT_FALSE(refused.text.empty()) << wrong;
  }
}

TEST(PlanProgram, NamesInAnyCaseAndOfEveryCheckpoint) {
  const std::string v3 = run("plan --model deepseek-v3 --hardware h200 --ep 16", false).text;
  for (const char* names :
       {"--model DeepSeek-V3 --hardware H200", "--model deepseek-r1 --hardware \"H200 SXM\"",
        "--model deepseek-ai/DeepSeek-R1-0528 --hardware \"NVIDIA H200\"",
        "--model r1 --hardware nvidia/h200"}) {
    EXPECT_EQ(run(std::string("plan --ep 16 ") + names, false).text, v3) << names;
  }
  for (const char* card : {"h20", "H100", "h800", "A100"}) {
    EXPECT_NE(run(std::string("plan --ep 64 --dense bf16 --moe bf16 --hardware ") + card, true).code, 2)
        << card;
  }
  EXPECT_EQ(run("plan --model deepseek-v9", true).code, 2);
}

TEST(PlanProgram, TablesHaveTheCardsAndTheUsers) {
  const std::string sweep = run("plan --sweep ep=16,32 batch=8 --format csv", false).text;
  std::stringstream lines(sweep);
  std::string head, first, second;
  std::getline(lines, head);
  std::getline(lines, first);
  std::getline(lines, second);
  const auto column = [&](const std::string& line, const std::string& name) {
    std::stringstream names(head), cells(line);
    std::string key, cell;
    while (std::getline(names, key, ',') && std::getline(cells, cell, ',')) {
      if (key == name) return cell;
    }
    return std::string("no such column");
  };
  EXPECT_EQ(column(first, "cards"), "16");
  EXPECT_EQ(column(first, "users"), "128");
  EXPECT_EQ(column(second, "cards"), "32");
  EXPECT_EQ(column(second, "users"), "256");
  EXPECT_NE(run("plan compare --case ep=16", false).text.find("cards  users"), std::string::npos);
}

// What a program reads as JSON may have them.
TEST(PlanProgram, NumbersHaveNoExponents) {
  const std::regex exponent("[0-9]e[+-]?[0-9]");
  for (const char* command : {"plan --model deepseek-v3.2 --input 100000 --ep 32", "plan --explain --ep 16",
                              "plan --format csv --ep 16", "plan tables", "plan tables --format csv",
                              "plan --sweep ep=16,32 --format csv"}) {
    const std::string text = run(command, false).text;
    EXPECT_GT(text.size(), 300u);
    EXPECT_FALSE(std::regex_search(text, exponent)) << command;
  }
  EXPECT_NE(run("plan --model deepseek-v3.2 --input 100000 --ep 32", false).text.find("64850"),
            std::string::npos);
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
