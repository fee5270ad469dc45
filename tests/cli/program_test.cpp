// The program as a user meets it: output, exit codes, result files.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Outcome {
  int exit_code = -1;
  std::string output;  ///< stdout and stderr
};

Outcome run(const std::string& arguments, const std::string& environment = "") {
  const std::string command = environment + " '" FLASH_MLA_PROGRAM "' " + arguments + " 2>&1 </dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  Outcome outcome;
  if (pipe == nullptr) return outcome;
  std::array<char, 4096> part{};
  for (std::size_t n; (n = std::fread(part.data(), 1, part.size(), pipe)) > 0;) {
    outcome.output.append(part.data(), n);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  return outcome;
}

void expect_usage_error(const std::string& arguments, const std::string& message,
                        const std::string& environment = "") {
  const Outcome o = run(arguments, environment);
  EXPECT_EQ(o.exit_code, 2) << arguments << "\n" << o.output;
  EXPECT_NE(o.output.find(message), std::string::npos) << arguments << "\n" << o.output;
}

TEST(Program, HelpEverywhere) {
  for (const std::string command : {"", "info", "demo", "verify", "bench"}) {
    const Outcome o = run(command + " --help");
    EXPECT_EQ(o.exit_code, 0) << command;
    EXPECT_NE(o.output.find("Usage: flash-mla"), std::string::npos) << o.output;
  }
  EXPECT_NE(run("--help").output.find("verify"), std::string::npos);
}

TEST(Program, BadFlagsExplainThemselves) {
  expect_usage_error("", "subcommand");
  expect_usage_error("nope", "unknown command \"nope\", expected one of: info, demo, verify, bench");
  expect_usage_error("bench --b 0", "--b: value is \"0\", expected an integer from 1 to 65536");
  expect_usage_error("bench --s-k 16,x", "--s-k: value is \"x\"");
  expect_usage_error("bench --dtype bf16,int8", "value is \"int8\", expected bf16, fp16 or fp32");
  expect_usage_error("bench --h-q 3 --h-kv 2", "h_q is 3, expected a multiple of h_kv = 2");
  expect_usage_error("bench --preset /no/such.json", "/no/such.json: No such file");
  expect_usage_error("bench --min-time soon", "--min-time: value is \"soon\", expected a number");
  expect_usage_error("bench --blas /no/such.so", "--blas: /no/such.so");
  expect_usage_error("bench --wrong", "--wrong");
  expect_usage_error("verify --cases many", "expected an integer from 1");
  expect_usage_error("bench --plot x.png --python /no/such/python", "--python is \"/no/such/python\"");
  expect_usage_error("info", "FLASH_MLA_CPU_ISA is \"mmx\"", "FLASH_MLA_CPU_ISA=mmx");
}

TEST(Program, UnknownFlagsAreNamedInOrderWithTheNearest) {
  expect_usage_error("benhc", "unknown command \"benhc\" (did you mean bench?), expected one of: info");
  expect_usage_error(
      "generate --modle x --prompt a --zzzzzz 3 --tempratur=0.5",
      "flash-mla generate: unknown flags --modle (did you mean --model?), --zzzzzz, --tempratur (did you "
      "mean --temperature?); flash-mla generate --help lists what there is");
  expect_usage_error("serve --portt 1 --hots ::1",
                     "unknown flags --portt (did you mean --port?), --hots (did you mean --host?)");
  expect_usage_error("chat --temp 1", "unknown flag --temp (did you mean --temperature?)");
  expect_usage_error("generate -m /tmp -x 3", "unknown flag -x; flash-mla");
  expect_usage_error("info more and more", "flash-mla info: unknown arguments \"more\", \"and\", \"more\"");
  for (const std::string command : {"demo", "verify", "bench", "bench-engine", "plan", "loadtest"}) {
    expect_usage_error(command + " --hepl",
                       "flash-mla " + command + ": unknown flag --hepl (did you mean --help?)");
  }
}

TEST(Program, InfoSaysHowThreadsWait) {
  const Outcome chosen = run("info", "env -u OMP_NUM_THREADS -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT");
  EXPECT_EQ(chosen.exit_code, 0);
  EXPECT_NE(chosen.output.find("  waiting threads    "), std::string::npos) << chosen.output;
  EXPECT_EQ(chosen.output.find("GOMP_SPINCOUNT"), std::string::npos) << chosen.output;
  const Outcome given = run("info", "OMP_NUM_THREADS=1 GOMP_SPINCOUNT=7");
  EXPECT_NE(given.output.find("threads            1 by default (OMP_NUM_THREADS=1)"), std::string::npos)
      << given.output;
  EXPECT_NE(given.output.find("as the environment says (GOMP_SPINCOUNT=7)"), std::string::npos)
      << given.output;
}

// A "Python" that is a shell script.
std::string fake_python(const std::string& name, const std::string& script) {
  const std::string path = ::testing::TempDir() + name;
  std::ofstream(path) << "#!/bin/sh\n" << script;
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  return path;
}

TEST(Program, PlotSaysWhatThePythonLacks) {
  const std::string nothing = fake_python("python_without_matplotlib", "exit 1\n");
  expect_usage_error("bench --plot x.png --python " + nothing, "the roofline picture needs matplotlib");
  expect_usage_error("bench --plot x.png --python " + nothing, "cannot import matplotlib; install it there");
  const std::string no_package =
      fake_python("python_without_package", "case $2 in *flash_mla*) exit 1 ;; esac\n");
  expect_usage_error("bench --plot x.png --python " + no_package,
                     "cannot import flash_mla_kernels.plot; install the package flash_mla_kernels there");
}

TEST(Program, PlotCallsThePackage) {
  const std::string picture = ::testing::TempDir() + "plot_test.png";
  const std::string python = fake_python("python_that_tells", "[ $1 = -c ] || echo \"called with $*\"\n");
  const std::string bench = "bench --b 1 --h-q 1 --s-k 8 --reps 1 --min-time 0 --no-blas -q";
  const Outcome o = run(bench + " --python " + python + " --plot " + picture);
  EXPECT_EQ(o.exit_code, 0) << o.output;
  EXPECT_NE(o.output.find("called with -m flash_mla_kernels.plot " + picture + ".json " + picture),
            std::string::npos)
      << o.output;
}

TEST(Program, InfoNamesBackendsAndInstructionSet) {
  const Outcome o = run("info");
  EXPECT_EQ(o.exit_code, 0);
  for (const char* word : {"cpu", "sm90", "instruction set", "FLASH_MLA_CPU_ISA", "Highway", "L2"}) {
    EXPECT_NE(o.output.find(word), std::string::npos) << word << "\n" << o.output;
  }
}

TEST(Program, VerifyRepeatsACase) {
  const Outcome all = run("verify --cases 4 --seed 5 --verbose --quiet");
  EXPECT_EQ(all.exit_code, 0) << all.output;
  const Outcome one = run("verify --seed 5 --case 3");
  EXPECT_EQ(one.exit_code, 0) << one.output;
  const std::string line = one.output.substr(0, one.output.find('\n') + 1);
  EXPECT_EQ(line.rfind("ok 3: ", 0), 0u) << line;
  EXPECT_NE(all.output.find(line), std::string::npos) << all.output << "\nlacks\n" << line;
}

TEST(Program, BenchWritesItsResults) {
  const std::string file = ::testing::TempDir() + "bench_test.json";
  std::filesystem::remove(file);
  const Outcome o =
      run("bench --preset '" FLASH_MLA_PRESETS "/smoke.json' --reps 3 --min-time 0 --json '" + file + "'");
  ASSERT_EQ(o.exit_code, 0) << o.output;
  EXPECT_NE(o.output.find("bench: 2 of 2: small-varlen"), std::string::npos) << "no progress\n" << o.output;
  const auto json = nlohmann::json::parse(std::ifstream(file));
  for (const char* key : {"cpu", "usable_cpus", "memory_bytes", "isa", "version", "compiler"}) {
    EXPECT_TRUE(json["machine"].contains(key)) << key;
  }
  EXPECT_TRUE(json["commit"].is_string());
  EXPECT_EQ(json["command"].get<std::string>().rfind("flash-mla bench --preset", 0), 0u) << json["command"];
  EXPECT_EQ(json["date"].get<std::string>().size(), 20u);
  ASSERT_EQ(json["limits"].size(), 1u);
  EXPECT_GT(json["limits"][0]["read_gbps"], 0);
  ASSERT_EQ(json["rows"].size(), 2u);
  for (const auto& row : json["rows"]) {
    for (const char* key : {"name",
                            "b",
                            "s_q",
                            "h_q",
                            "h_kv",
                            "s_k",
                            "tokens",
                            "varlen",
                            "causal",
                            "dtype",
                            "page_size",
                            "threads",
                            "cache",
                            "reps",
                            "ms",
                            "gflops",
                            "gbps",
                            "intensity",
                            "sgemm_ms",
                            "sgemm_gflops",
                            "ratio_sgemm",
                            "limit_fraction",
                            "limited_by",
                            "workspace_bytes",
                            "peak_rss_bytes"}) {
      EXPECT_TRUE(row.contains(key)) << key;
    }
    const double flop =
        2.0 * row["h_q"].get<double>() * row["s_q"].get<double>() * row["tokens"].get<double>() * (576 + 512);
    EXPECT_NEAR(row["gflops"].get<double>(), flop / row["ms"].get<double>() / 1e6, 1e-6 * flop);
    EXPECT_GE(row["reps"], 3);
    EXPECT_GT(row["limit_fraction"], 0);
  }
  EXPECT_EQ(json["rows"][0]["tokens"], 512);
  EXPECT_EQ(json["rows"][1]["dtype"], "float32");
}

// Where there is a GPU, the CUDA runtime is told to see none.
constexpr const char* kNoGpu = "CUDA_VISIBLE_DEVICES=";

TEST(Program, BenchOnAGpuThatIsNotThereSaysWhy) {
  expect_usage_error("bench --device cuda", "--device cuda: ", kNoGpu);
  expect_usage_error("bench --preset h200-dense", "preset h200-dense is made for a GPU: ", kNoGpu);
  expect_usage_error("bench --device tpu", "--device");
  expect_usage_error("bench --preset h200-dense --only b7",
                     "--only is \"b7\", which no shape's name contains");
  expect_usage_error("bench --device cuda --threads 2",
                     "--threads is for --device cpu, but --device is cuda");
  expect_usage_error("bench --device cuda --plot x.png", "--plot is for --device cpu");
}

// The words of the line that begins with `name`, behind it.
std::vector<std::string> words_after(const std::string& name, const std::string& output) {
  const std::size_t at = output.find("\n" + name + " ");
  if (at == std::string::npos) return {};
  std::istringstream line(
      output.substr(at + 1 + name.size(), output.find('\n', at + 1) - at - 1 - name.size()));
  return {std::istream_iterator<std::string>(line), {}};
}

TEST(Program, BenchExplainsHowAShapeIsRun) {
  const Outcome o = run("bench --preset h200-dense --explain", kNoGpu);
  ASSERT_EQ(o.exit_code, 0) << o.output;
  EXPECT_NE(o.output.find("assumes 132 multiprocessors"), std::string::npos) << o.output;
  // Row blocks, cluster, parts, overhead, fewest tiles of a part, whole requests, bound, grids of the decode
  // and the combine kernel.
  const auto expect_row = [&](const std::string& name, const std::vector<std::string>& expected) {
    std::vector<std::string> words = words_after(name, o.output);
    ASSERT_GE(words.size(), expected.size()) << name << "\n" << o.output;
    words.resize(expected.size());
    EXPECT_EQ(words, expected) << name;
  };
  expect_row("b128 h128 s1024 bf16",
             {"2", "of", "1x64", "2", "66", "4", "1", "5%", "compute", "2x1x66", "1x16x66"});
  expect_row("b128 h128 s1024 bf16 sq2 causal",
             {"4", "of", "1x64", "2", "33", "4", "1", "5%", "compute", "4x1x33", "1x32x33"});
  expect_row("b1 h16 s1024 bf16",
             {"1", "of", "1x16", "1", "132", "0", "1", "-", "memory", "1x1x132", "64x2x1"});
  expect_row("b32 h128 s1024 bf16",
             {"2", "of", "1x64", "2", "66", "0", "2", "-", "compute", "2x1x66", "1x16x32"});
}

TEST(Program, BenchTakesTheShapesThatAreNamed) {
  const Outcome o = run("bench --preset h200-dense --only 'h128 s4096 bf16 sq2' --explain", kNoGpu);
  EXPECT_EQ(o.exit_code, 0) << o.output;
  EXPECT_FALSE(words_after("b128 h128 s4096 bf16 sq2", o.output).empty()) << o.output;
  EXPECT_TRUE(words_after("b128 h128 s4096 bf16", o.output).at(0) == "sq2") << o.output;
  EXPECT_EQ(o.output.find("h16"), std::string::npos) << o.output;
}

TEST(Program, BenchExplainsWhatTheBackendDoesNotTake) {
  const Outcome o = run("bench --h-q 3 --s-q 5 --dtype bf16,fp32 --page-size 48 --explain", kNoGpu);
  EXPECT_EQ(o.exit_code, 0);
  for (const char* text :
       {"page_size is 48, expected 16, 32 or a multiple of 64", "dtype is fp32, expected bf16 or fp16"}) {
    EXPECT_NE(o.output.find(text), std::string::npos) << text << "\n" << o.output;
  }
}

TEST(Program, BenchTakesListsOfShapes) {
  const Outcome o = run(
      "bench --b 1,2 --h-q 1 --s-k 8,16 --dtype fp32 --threads 1 --reps 1 --min-time 0 --no-blas --quiet");
  EXPECT_EQ(o.exit_code, 0) << o.output;
  for (const char* name : {"b1 h1 s8 fp32", "b1 h1 s16 fp32", "b2 h1 s8 fp32", "b2 h1 s16 fp32"}) {
    EXPECT_NE(o.output.find(name), std::string::npos) << name << "\n" << o.output;
  }
  EXPECT_NE(o.output.find("not measured: switched off by --no-blas"), std::string::npos) << o.output;
}

TEST(Program, AFileThatCannotBeWrittenIsAnError) {
  const Outcome o =
      run("bench --b 1 --h-q 1 --s-k 8 --reps 1 --min-time 0 --no-blas -q --json /no/such/dir/x");
  EXPECT_EQ(o.exit_code, 1);
  EXPECT_NE(o.output.find("cannot write /no/such/dir/x"), std::string::npos) << o.output;
}

}  // namespace
