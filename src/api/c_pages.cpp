// The C ABI of pages of keys and values.

#include "flash_mla/c_pages.h"

#include "api/c_guard.h"
#include "flash_mla/pages.h"

namespace {

using namespace flash_mla;
using api::guarded;
using api::optional_view;
using api::required;
using api::view;

}  // namespace

flash_mla_status flash_mla_append_pages(const flash_mla_page_append_args* args, int32_t num_threads) {
  return guarded([&] {
    const flash_mla_page_append_args& a = required(args, "args");
    PageAppendArgs append;
    append.key = view(a.key, "key");
    append.value = optional_view(a.value, "value");
    append.batch_indices = view(a.batch_indices, "batch_indices");
    append.positions = view(a.positions, "positions");
    append.page_indptr = view(a.page_indptr, "page_indptr");
    append.page_indices = view(a.page_indices, "page_indices");
    append.k_cache = view(a.k_cache, "k_cache");
    append.v_cache = optional_view(a.v_cache, "v_cache");
    RowOptions options;
    options.num_threads = num_threads;
    append_pages(append, options);
  });
}

flash_mla_status flash_mla_batch_positions(const DLTensor* indptr, const DLTensor* seqlens,
                                           DLTensor* batch_indices, DLTensor* positions) {
  return guarded([&] {
    batch_positions(view(indptr, "indptr"), view(seqlens, "seqlens"), view(batch_indices, "batch_indices"),
                    view(positions, "positions"));
  });
}

flash_mla_status flash_mla_paged_seqlens(const DLTensor* page_indptr, const DLTensor* last_page_len,
                                         int64_t page_size, DLTensor* seqlens) {
  return guarded([&] {
    paged_seqlens(view(page_indptr, "page_indptr"), view(last_page_len, "last_page_len"), page_size,
                  view(seqlens, "seqlens"));
  });
}
