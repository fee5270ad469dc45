#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/host_memory.h"
#include "base/parallel.h"
#include "flash_mla/error.h"
#include "model/deepseek.h"
#include "model/device/cpu/cpu_device.h"
#include "model/device/cuda/cuda_device.h"
#include "model/parallel/lock_step.h"
#include "model/parallel/parallel_model.h"
#include "model/parallel/partition.h"
#include "model/size.h"
#include "model/weights.h"

namespace flash_mla::model {
namespace {

DType cpu_dtype(ModelPrecision precision) {
  switch (precision) {
    case ModelPrecision::kFloat32:
      return DType::kFloat32;
    case ModelPrecision::kBFloat16:
      return DType::kBFloat16;
    case ModelPrecision::kAuto:
      break;
  }
  return preferred_cpu_dtype();
}

// A GPU where there is one that can run the model and nothing asks for what it cannot do.
bool takes_cuda(const ModelConfig& config, const ModelOptions& options) {
  switch (options.device) {
    case ModelDevice::kCpu:
      return false;
    case ModelDevice::kCuda:
      return true;
    case ModelDevice::kAuto:
      break;
  }
  const bool ranks_alike = options.dp == 1 && (options.tp == 1 || !options.devices.empty());
  return ranks_alike && why_no_cuda_indexer(config).empty() && options.kv_cache != ModelKvCache::kFloat16 &&
         (options.kv_cache != ModelKvCache::kFp8 || config.index_topk > 0) &&
         options.precision != ModelPrecision::kFloat32 && options.quantize != ModelQuantize::kInt8 &&
         why_no_cuda_device().empty();
}

/// One of the ranks that share a model.
struct Seat {
  Partition partition;
  RankLinks links;
};

/// The GPU of each rank.
std::vector<int> cuda_devices(const ModelOptions& options) {
  const auto size = static_cast<std::size_t>(options.tp);
  std::vector<int> out = options.devices;
  if (out.empty()) {
    out.resize(size);
    std::iota(out.begin(), out.end(), 0);
    if (const int gpus = num_cuda_devices(); gpus < options.tp) {
      throw Unsupported(fmt::format(
          "tp is {}: device cuda has {} GPUs, expected one for each rank (devices puts several on one)",
          options.tp, gpus));
    }
  }
  if (out.size() != size) {
    throw InvalidArgument(
        fmt::format("devices has {} GPUs, expected {}, one for each rank", out.size(), size));
  }
  for (std::size_t rank = 0; rank < size; ++rank) {
    const int most = rank == 0 ? 0 : num_cuda_devices() - 1;
    if (out[rank] >= 0 && out[rank] <= std::max(most, 0)) continue;
    throw InvalidArgument(fmt::format(
        "devices[{}] is {}, expected {}", rank, out[rank],
        rank == 0 ? "0 (CUDA_VISIBLE_DEVICES says which GPU that is)" : fmt::format("0 to {}", most)));
  }
  return out;
}

std::unique_ptr<Device> make_device(const ModelConfig& config, const ModelOptions& options,
                                    const Seat& seat) {
  if (!takes_cuda(config, options)) {
    const DType dtype = cpu_dtype(options.precision);
    const std::optional<KvFormat> cache_format = cpu_cache_format(config, dtype, options.kv_cache);
    check_fits(config, dtype, options.quantize, static_cast<double>(host_memory()), options.dp);
    return make_cpu_device(seat.partition.local(config), dtype, cache_format, options, seat.partition,
                           seat.links);
  }
  const std::vector<int> devices = cuda_devices(options);
  CudaSeat place{seat.partition, seat.links, devices[static_cast<std::size_t>(seat.partition.rank)]};
  place.sharing = static_cast<int>(std::ranges::count(devices, place.device));
  return make_cuda_device(seat.partition.local(config), options.quantize, options.time_steps,
                          options.kv_cache == ModelKvCache::kFp8, place);
}

/// Throws unless a GPU can run the model so, before anything is loaded. `module`: with one for multi-token prediction.
void check_cuda(const ModelConfig& config, const ModelOptions& options, bool module) {
  if (options.dp > 1) {
    throw Unsupported(fmt::format(
        "dp is {}: on device cuda all ranks have the same tokens so far; use tp or device cpu", options.dp));
  }
  if (const std::string why = why_no_cuda_indexer(config); !why.empty()) throw Unsupported(why);
  const bool fp8_cache = options.kv_cache == ModelKvCache::kFp8;
  if (options.kv_cache == ModelKvCache::kFloat16 || (fp8_cache && config.index_topk == 0)) {
    throw Unsupported(
        fmt::format("kv_cache: device cuda keeps the cache of this model in bfloat16; {} needs device cpu",
                    fp8_cache ? "fp8" : "float16"));
  }
  if (options.precision == ModelPrecision::kFloat32) {
    throw Unsupported("device cuda runs models in bfloat16; precision float32 needs device cpu");
  }
  if (options.quantize == ModelQuantize::kInt8) {
    throw Unsupported("quantize is int8: device cuda keeps weights in bfloat16, fp8 or w4a8; use device cpu");
  }
  if (options.tp > 1 && config.hidden_size % 8 != 0) {
    throw Unsupported(fmt::format(
        "hidden_size is {}, expected a multiple of 8 for several ranks on device cuda", config.hidden_size));
  }
  if (const std::string why = why_no_cuda_device(); !why.empty()) throw Unsupported("device cuda: " + why);
  const std::vector<int> devices = cuda_devices(options);
  DeviceMemory memory;  // of all ranks' GPUs
  for (const int device : std::set<int>(devices.begin(), devices.end())) {
    const DeviceMemory more = cuda_memory(device);
    memory.free += more.free;
    memory.total += more.total;
  }
  check_fits_device(config, options.cache_pages, static_cast<double>(options.cache_bytes), fp8_cache, memory,
                    options.quantize, module);
}

/// Weights whose reader is told of: a model asks for those of a layer once it has made the layers before.
class WatchedWeights : public WeightSource {
 public:
  /// `bytes_each(kind)`: of a weight; `wide`: of those that are never quantised.
  WatchedWeights(const ModelConfig& config, std::unique_ptr<WeightSource> source, double weight_bytes,
                 double wide, std::function<double(LayerKind)> bytes_each, int rank,
                 const std::function<void(const LoadProgress&)>& on_load)
      : config_(config),
        source_(std::move(source)),
        weight_bytes_(weight_bytes),
        wide_(wide),
        bytes_each_(std::move(bytes_each)),
        on_load_(on_load),
        rank_(rank) {}

  Weight embedding() override {
    Weight out = source_->embedding();
    bytes_ += static_cast<double>(out.size()) * wide_;
    return out;
  }
  AttentionWeights attention(int layer) override {
    if (layer < config_.num_hidden_layers) report(layer, num_weights_before(config_, layer));
    AttentionWeights out = source_->attention(layer);
    bytes_ += static_cast<double>(out.kv_b.size()) * wide_;
    for (const Weight* w :
         {&out.qkv_a, &out.q_b, &out.o, &out.indexer.q_b, &out.indexer.k, &out.indexer.head_weights}) {
      count(*w, LayerKind::kAttention);
    }
    return out;
  }
  FeedForwardWeights feed_forward(int layer) override {
    FeedForwardWeights out = source_->feed_forward(layer);
    count(out.gate_up, LayerKind::kDense);
    count(out.down, LayerKind::kDense);
    return out;
  }
  MixtureWeights mixture(int layer) override {
    MixtureWeights out = source_->mixture(layer);
    count(out.shared_gate_up, LayerKind::kShared);
    count(out.shared_down, LayerKind::kShared);
    const auto mine = [&](const std::vector<int>& ranks) { return std::ranges::count(ranks, rank_) > 0; };
    const auto experts =
        out.ranks.empty() ? config_.n_routed_experts : std::ranges::count_if(out.ranks, mine);
    bytes_ += 3.0 * static_cast<double>(config_.hidden_size * out.intermediate * experts) *
              bytes_each_(LayerKind::kExperts);
    return out;
  }
  HeadWeights head() override {
    HeadWeights out = source_->head();
    count(out.weight, LayerKind::kHead);
    return out;
  }
  bool has_mtp() const override { return source_->has_mtp(); }
  MtpWeights mtp() override {
    MtpWeights out = source_->mtp();
    count(out.projection, LayerKind::kDense);
    return out;
  }

  /// Of all that has been asked for.
  double bytes() const { return bytes_; }
  void report_end() const { report(config_.num_hidden_layers, num_weights(config_)); }

 private:
  void count(const Weight& weight, LayerKind kind) {
    bytes_ += static_cast<double>(weight.size()) * bytes_each_(kind);
  }
  void report(int layers, double weights) const {
    if (!on_load_) return;
    on_load_(
        {layers, config_.num_hidden_layers, weights * weight_bytes_, num_weights(config_) * weight_bytes_});
  }

  const ModelConfig& config_;
  std::unique_ptr<WeightSource> source_;
  double weight_bytes_, wide_;
  std::function<double(LayerKind)> bytes_each_;
  const std::function<void(const LoadProgress&)>& on_load_;
  int rank_;
  double bytes_ = 0;
};

std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelOptions& options, const Seat& seat,
                                  std::unique_ptr<Device> device, std::unique_ptr<WeightSource> source) {
  const double all = num_weights(config);
  const bool cuda = takes_cuda(config, options);
  const DType dtype = cuda ? DType::kBFloat16 : cpu_dtype(options.precision);
  const double bytes =
      cuda ? device_weight_bytes(config, options.quantize) : weight_bytes(config, dtype, options.quantize);
  const auto each = [&](LayerKind kind) {
    return cuda ? device_bytes_each(config, options.quantize, kind)
                : bytes_each(config, dtype, options.quantize, kind);
  };
  WatchedWeights weights(config, std::move(source), bytes / all, static_cast<double>(dtype_size(dtype)), each,
                         seat.partition.expert_rank, options.on_load);
  auto model = std::make_unique<DeepSeek>(seat.partition.local(config), std::move(device), weights,
                                          options.draft_module);
  weights.report_end();
  model->set_weight_bytes(weights.bytes());
  return model;
}

void check(const ModelConfig& config, const ModelOptions& o) {
  const auto fail = [](const char* name, std::int64_t value, const std::string& expected) {
    throw InvalidArgument(fmt::format("{} is {}, expected {}", name, value, expected));
  };
  if (o.num_threads < 0) fail("num_threads", o.num_threads, ">= 0");
  if (o.dp < 1) fail("dp", o.dp, ">= 1");
  if (o.device == ModelDevice::kCpu && !o.devices.empty()) {
    throw InvalidArgument(fmt::format("devices has {} GPUs, expected none: device is cpu", o.devices.size()));
  }
  if (o.tp < 1 || config.num_attention_heads % o.tp != 0) {
    fail("tp", o.tp, fmt::format("a divisor of {}, the attention heads", config.num_attention_heads));
  }
  const int ranks = o.tp * o.dp;
  if (o.ep < 0 || (o.ep > 0 && ranks % o.ep != 0)) {
    fail("ep", o.ep, fmt::format("0 or a divisor of {}, tp times dp", ranks));
  }
  if (ranks == 1) return;
  if (o.on_product) throw Unsupported(fmt::format("on_product with {} ranks: expected 1", ranks));
  if (o.tp == 1) return;
  for (const auto& [name, size] :
       {std::pair("hidden_size", config.hidden_size), std::pair("vocab_size", config.vocab_size),
        std::pair("intermediate_size", config.intermediate_size),
        std::pair("moe_intermediate_size", config.moe_intermediate_size)}) {
    if (size > 0 && size < o.tp) fail("tp", o.tp, fmt::format("at most {}, {}", size, name));
  }
}

/// Models on as many ranks as the options ask for: one for each of dp. `module`: with one for multi-token prediction.
/// `weights(device, partition)`: the source of a rank's.
template <class Weights>
std::vector<std::unique_ptr<Model>> make_ranks(const ModelConfig& config, const ModelOptions& options,
                                               bool module, const Weights& weights) {
  const auto take_seat = [&](const ModelOptions& own, const Seat& seat) {
    std::unique_ptr<Device> device = make_device(config, own, seat);
    auto source = weights(*device, seat.partition);
    return make_model(config, own, seat, std::move(device), std::move(source));
  };
  const bool cuda = takes_cuda(config, options);
  if (cuda) check_cuda(config, options, module);
  std::vector<std::unique_ptr<Model>> out;
  const int tp = options.tp, ranks = tp * options.dp;
  if (ranks == 1) {
    out.push_back(take_seat(options, {}));
    return out;
  }
  const auto experts = std::make_shared<const ExpertPlacement>(
      config, ranks, options.ep > 0 ? options.ep : ranks, options.expert_placement);
  const int threads = options.num_threads > 0 ? options.num_threads : default_threads();
  const auto make = [&](int rank, const RankLinks& links) {  // `rank`: among all
    ModelOptions own = options;
    own.num_threads = std::max(threads / ranks, 1);
    if (rank > 0) own.on_load = nullptr;
    const bool own_tokens = options.dp > 1;
    return take_seat(
        own, {{rank % tp, tp, options.batch_invariant && !cuda, experts, own_tokens, rank, ranks}, links});
  };
  if (options.dp == 1) {
    out.push_back(std::make_unique<ParallelModel>(tp, [&](int rank, comm::Communicator& group) {
      return make(rank, {&group, nullptr});
    }));
    return out;
  }
  if (tp == 1) {
    return LockStepModel::make(ranks, options.batch_invariant, [&](int rank, comm::Communicator& all) {
      return make(rank, {nullptr, &all});
    });
  }
  const auto all = std::make_shared<comm::ThreadGroup>(ranks);
  std::vector<int> firsts;
  for (int first = 0; first < ranks; first += tp) firsts.push_back(first);
  return LockStepModel::make(std::move(firsts), options.batch_invariant, [&](int group, comm::Communicator&) {
    const int first = group * tp;
    return std::make_unique<ParallelModel>(
        tp, all, first, [&](int rank, const RankLinks& links) { return make(first + rank, links); });
  });
}

// The model of options that ask for one.
std::unique_ptr<Model> only(std::vector<std::unique_ptr<Model>> models) { return std::move(models.front()); }

void check_one(const ModelOptions& options) {
  if (options.dp != 1)
    throw InvalidArgument(fmt::format("dp is {}, expected 1: one model is asked for", options.dp));
}

}  // namespace

std::unique_ptr<Model> load_model(const std::filesystem::path& directory, const ModelOptions& options) {
  check_one(options);
  return only(load_models(directory, options));
}

std::unique_ptr<Model> make_random_model(const ModelConfig& config, const ModelOptions& options) {
  check_one(options);
  return only(make_random_models(config, options));
}

std::vector<std::unique_ptr<Model>> load_models(const std::filesystem::path& directory,
                                                const ModelOptions& options) {
  const ModelConfig config = checkpoint::read_config(directory);
  check(config, options);
  const Checkpoint checkpoint = Checkpoint::open(directory);
  const bool module = options.draft_module && has_module(config, checkpoint);
  return make_ranks(config, options, module, [&](const Device& device, const Partition& partition) {
    return checkpoint_weights(config, checkpoint, device.weight_dtype(), partition);
  });
}

std::vector<std::unique_ptr<Model>> make_random_models(const ModelConfig& config,
                                                       const ModelOptions& options) {
  check(config, options);
  const bool module = options.draft_module && config.shares_index.empty();
  return make_ranks(config, options, module, [&](const Device& device, const Partition& partition) {
    return random_weights(config, device.makes_up_weights(), module, partition);
  });
}

}  // namespace flash_mla::model
