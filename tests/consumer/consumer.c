#include <flash_mla/c_api.h>
#include <stdio.h>
#include <string.h>

static DLTensor tensor(void* data, int code, int bits, int ndim, int64_t* shape) {
  DLTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = ndim;
  t.dtype.code = (uint8_t)code;
  t.dtype.bits = (uint8_t)bits;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

/* Plans two requests for two workers, then asks for something impossible and reads the message. */
int main(void) {
  int32_t lengths[2] = {20, 140}, parts[2][8], splits[3];
  int64_t b[1] = {2}, part_shape[2] = {2, 8}, split_shape[1] = {3};
  DLTensor t_lengths = tensor(lengths, kDLInt, 32, 1, b);
  DLTensor t_parts = tensor(parts, kDLInt, 32, 2, part_shape);
  DLTensor t_splits = tensor(splits, kDLInt, 32, 1, split_shape);
  if (flash_mla_build_decode_schedule(&t_lengths, NULL, &t_parts, &t_splits) != FLASH_MLA_OK) {
    printf("%s\n", flash_mla_last_error());
    return 1;
  }
  if (splits[0] != 0 || splits[2] < 2) return 1;
  lengths[1] = -1;
  if (flash_mla_build_decode_schedule(&t_lengths, NULL, &t_parts, &t_splits) != FLASH_MLA_INVALID_ARGUMENT)
    return 1;
  if (strstr(flash_mla_last_error(), "cache_seqlens[1] is -1") == NULL) return 1;
  return 0;
}
