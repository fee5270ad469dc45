#ifndef FLASH_MLA_C_PAGES_H_
#define FLASH_MLA_C_PAGES_H_

/* The C ABI of flash_mla/pages.h: keys and values into pages. Part of c_api.h. num_threads 0: as many as OpenMP would use. */

#include "flash_mla/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* flash_mla::PageAppendArgs. value and v_cache may be NULL, both; k_cache and v_cache are written. */
typedef struct flash_mla_page_append_args {
  const DLTensor* key;
  const DLTensor* value;
  const DLTensor* batch_indices;
  const DLTensor* positions;
  const DLTensor* page_indptr;
  const DLTensor* page_indices;
  DLTensor* k_cache;
  DLTensor* v_cache;
} flash_mla_page_append_args;

/* See flash_mla::append_pages. */
FLASH_MLA_API flash_mla_status flash_mla_append_pages(const flash_mla_page_append_args* args,
                                                      int32_t num_threads);

/* See flash_mla::batch_positions; batch_indices and positions are written. */
FLASH_MLA_API flash_mla_status flash_mla_batch_positions(const DLTensor* indptr, const DLTensor* seqlens,
                                                         DLTensor* batch_indices, DLTensor* positions);

/* See flash_mla::paged_seqlens; seqlens is written. */
FLASH_MLA_API flash_mla_status flash_mla_paged_seqlens(const DLTensor* page_indptr,
                                                       const DLTensor* last_page_len, int64_t page_size,
                                                       DLTensor* seqlens);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_MLA_C_PAGES_H_ */
