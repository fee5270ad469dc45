#include "bench/gpu_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "bench/machine.h"

namespace flash_mla::bench {

using Json = nlohmann::ordered_json;

Json gpu_report(const gpu::Device& device, const char* protocol) {
  Json json = report_head();
  json["device"] = "cuda";
  json["machine"]["gpu"] = device.name;
  json["machine"]["driver"] = device.driver;
  json["machine"]["cuda"] = device.cuda;
  json["machine"]["gpu_multiprocessors"] = device.sms;
  json["machine"]["gpu_memory_bytes"] = device.memory_bytes;
  json["protocol"] = protocol;
  return json;
}

Json to_json(const gpu::Limits& l) {
  Json json = {{"read_gbps", l.read_gbps}, {"read_bytes", l.read_bytes}, {"copy_gbps", l.copy_gbps}};
  if (l.why_no_matmul.empty()) {
    json["matmul_gflops"] = l.matmul_gflops;
    json["matmul_graph_gflops"] = l.matmul_graph_gflops;
    json["matmul"] = fmt::format("8192 x 8192 x 8192 bf16 by {}", l.matmul_library);
  } else {
    json["matmul_gflops"] = nullptr;
    json["matmul_graph_gflops"] = nullptr;
    json["matmul"] = "not measured: " + l.why_no_matmul;
  }
  return json;
}

std::string limits_line(const gpu::Limits& l) {
  return fmt::format("limits of this process: read {:.0f} GB/s, copy {:.0f} GB/s, matmul {}", l.read_gbps,
                     l.copy_gbps,
                     l.why_no_matmul.empty()
                         ? fmt::format("{:.1f} TFLOP/s, {:.1f} in a graph of 20 ({})", l.matmul_gflops / 1e3,
                                       l.matmul_graph_gflops / 1e3, l.matmul_library)
                         : "not measured: " + l.why_no_matmul);
}

}  // namespace flash_mla::bench
