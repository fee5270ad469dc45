#pragma once

#if defined(_WIN32)
#error "flash_mla supports Linux on x86-64 only"
#elif defined(__GNUC__)
#define FLASH_MLA_API __attribute__((visibility("default")))
#else
#define FLASH_MLA_API
#endif
