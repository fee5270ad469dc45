#include "model/device/cpu/embedding.h"

#include <algorithm>
#include <cstring>

#include "base/aligned.h"
#include "kernels/rows/cpu/rows.h"
#include "model/device/cpu/linear.h"

namespace flash_mla::model {

CpuEmbedding::CpuEmbedding(CpuContext& context, const Weight& table)
    : context_(context),
      table_(allocate_aligned(static_cast<std::size_t>(table.size()) * dtype_size(context.dtype))) {
  cpu::rows::narrow(read_values(table).data(), table_.data(), context.dtype, table.size());
}

Residual CpuEmbedding::forward() {
  const Step& step = *context_.step;
  const Matrix x = context_.activations(context_.buffers.x, step.num_tokens(), context_.config.hidden_size);
  const auto* chosen = reinterpret_cast<const std::int32_t*>(context_.buffers.tokens.data());
  const auto bytes = static_cast<std::size_t>(x.columns * context_.element());
  context_.for_rows(x.rows, x.columns, [&](std::int64_t t) {
    std::int32_t id = step.token_ids[static_cast<std::size_t>(t)];
    if (id < 0) id = std::max(chosen[-1 - id], 0);
    std::memcpy(x.row(t), table_.data() + static_cast<std::size_t>(id) * bytes, bytes);
  });
  return {x};
}

}  // namespace flash_mla::model
