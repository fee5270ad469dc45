# XGrammar's C++ core, as the object library flash_mla_xgrammar: what allows a text token by token (src/grammar).
#
# No distribution packages it; PyPI's source distribution has the whole core, and what it needs (picojson, DLPack) with it.
# It is downloaded while configuring. -DFETCHCONTENT_SOURCE_DIR_XGRAMMAR=DIR takes a source tree instead, and
# -DFLASH_MLA_XGRAMMAR=OFF builds without: then requests for a format of the text are refused.

option(FLASH_MLA_XGRAMMAR "Structured output, by XGrammar" ON)
if(NOT FLASH_MLA_XGRAMMAR)
  return()
endif()

include(FetchContent)
set(xgrammar_release 0.2.9)
set(xgrammar_url "https://files.pythonhosted.org/packages/3a/2f/5bf8e8fa6619cff534932f79b0abc81a417d354bc5093252c1a6081d0a93")
# SOURCE_SUBDIR without a CMakeLists.txt: its own build makes more than the core, for other machines.
FetchContent_Declare(
  xgrammar
  URL "${xgrammar_url}/xgrammar-${xgrammar_release}.tar.gz"
  URL_HASH SHA256=87b466bca2475e29bb0323abc62c6c33cbcbcff47e5fb800a3e2099ac9620b90
  SOURCE_SUBDIR include)
FetchContent_MakeAvailable(xgrammar)
message(STATUS "XGrammar from ${xgrammar_SOURCE_DIR}")

file(GLOB_RECURSE xgrammar_sources CONFIGURE_DEPENDS "${xgrammar_SOURCE_DIR}/cpp/*.cc")
list(FILTER xgrammar_sources EXCLUDE REGEX "/cpp/tvm_ffi/.*\\.cc$")

# Strings with bounds of their length may hold tabs and other control characters there, which JSON must escape: one file is
# compiled with the class of characters put right.
set(xgrammar_converter "${xgrammar_SOURCE_DIR}/cpp/json_schema_converter.cc")
file(READ "${xgrammar_converter}" xgrammar_text)
set(xgrammar_wrong "{{'\"', '\"'}, {'\\\\', '\\\\'}, {'\\r', '\\r'}, {'\\n', '\\n'}}, true")
string(FIND "${xgrammar_text}" "${xgrammar_wrong}" xgrammar_at)
if(xgrammar_at EQUAL -1)
  message(FATAL_ERROR "XGrammar in ${xgrammar_SOURCE_DIR} is not ${xgrammar_release}, for which this build knows a mend")
endif()
string(REPLACE "${xgrammar_wrong}" "{{0, 0x1f}, {'\"', '\"'}, {'\\\\', '\\\\'}}, true" xgrammar_text "${xgrammar_text}")
set(xgrammar_mended "${CMAKE_CURRENT_BINARY_DIR}/xgrammar/json_schema_converter.cc")
file(CONFIGURE OUTPUT "${xgrammar_mended}" CONTENT "@xgrammar_text@" @ONLY)
list(REMOVE_ITEM xgrammar_sources "${xgrammar_converter}")
list(APPEND xgrammar_sources "${xgrammar_mended}")
add_library(flash_mla_xgrammar OBJECT ${xgrammar_sources})
flash_mla_target_defaults(flash_mla_xgrammar)
set_target_properties(flash_mla_xgrammar PROPERTIES CXX_STANDARD 17)
# Its warnings are not ours. What it would only warn of (a keyword that it passes over) must reach the client: it logs
# through src/grammar/xgrammar_log.cpp.
target_compile_options(flash_mla_xgrammar PRIVATE -w -O2)
target_compile_definitions(flash_mla_xgrammar PRIVATE XGRAMMAR_LOG_CUSTOMIZE=1 XGRAMMAR_ENABLE_CPPTRACE=0
                                                      XGRAMMAR_ENABLE_INTERNAL_CHECK=0)
set(xgrammar_include "${xgrammar_SOURCE_DIR}/include" "${xgrammar_SOURCE_DIR}/3rdparty/picojson"
                     "${xgrammar_SOURCE_DIR}/3rdparty/dlpack/include")
target_include_directories(flash_mla_xgrammar SYSTEM PRIVATE ${xgrammar_include} "${xgrammar_SOURCE_DIR}/cpp")
