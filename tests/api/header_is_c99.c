/* The C header is C99 on its own. */
#include "flash_mla/c_api.h"

int header_is_c99(void);
int header_is_c99(void) { return FLASH_MLA_OK; }
