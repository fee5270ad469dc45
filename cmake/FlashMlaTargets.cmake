# Settings every target of this project shares.

add_library(flash_mla_build_settings INTERFACE)
target_compile_features(flash_mla_build_settings INTERFACE cxx_std_20)
target_compile_options(
  flash_mla_build_settings
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall
            -Wextra
            -Wpedantic
            -Wshadow
            -Wnon-virtual-dtor
            -Woverloaded-virtual>
            $<$<AND:$<BOOL:${FLASH_MLA_WERROR}>,$<COMPILE_LANGUAGE:C,CXX>>:-Werror>)

if(FLASH_MLA_SANITIZE)
  target_compile_options(flash_mla_build_settings INTERFACE -fsanitize=${FLASH_MLA_SANITIZE} -fno-omit-frame-pointer
                                                            -fno-sanitize-recover=all)
  target_link_options(flash_mla_build_settings INTERFACE -fsanitize=${FLASH_MLA_SANITIZE})
endif()

# Hidden symbols, position-independent code and the settings above.
function(flash_mla_target_defaults target)
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:flash_mla_build_settings>)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden
                                             VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)
endfunction()

# For what runs once or waits (flags, reports, tests): there a quick build is worth more than a quick program. GCC needs
# half the time for -O1 of -O3, and clang under the sanitizers for -O0 of -O1.
set(FLASH_MLA_QUICK_BUILD $<$<AND:$<CONFIG:Release>,$<COMPILE_LANGUAGE:CXX>>:-O1>)
if(FLASH_MLA_SANITIZE)
  string(APPEND FLASH_MLA_QUICK_BUILD ";$<$<AND:$<CONFIG:RelWithDebInfo>,$<COMPILE_LANGUAGE:CXX>>:-O0>")
endif()
