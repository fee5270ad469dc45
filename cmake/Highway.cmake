# Google Highway 1.0 or later, as the target flash_mla_highway. Only its headers are used (src/kernels/attention/dense_decode/cpu/tile_fp32.cpp does
# its own dispatch), so that nothing built here needs libhwy at run time.
#
# In this order: Highway's own CMake package; pkg-config, for distributions that ship no CMake package; the release
# pinned here, downloaded while configuring. -DFETCHCONTENT_SOURCE_DIR_HIGHWAY=DIR takes a source tree instead of the
# download.

set(highway_release 1.0.7)
set(highway_commit ba0900a4957b929390ab73827235557959234fea)

add_library(flash_mla_highway INTERFACE)

if(NOT FETCHCONTENT_SOURCE_DIR_HIGHWAY)
  find_package(hwy CONFIG QUIET)
  if(hwy_FOUND AND hwy_VERSION VERSION_GREATER_EQUAL 1.0)
    set(FLASH_MLA_HIGHWAY_VERSION ${hwy_VERSION})
    get_target_property(highway_include hwy::hwy INTERFACE_INCLUDE_DIRECTORIES)
    set(highway_source "its CMake package in ${hwy_DIR}")
  else()
    find_package(PkgConfig QUIET)
    if(PkgConfig_FOUND)
      pkg_check_modules(highway_pc QUIET libhwy>=1.0)
    endif()
    if(highway_pc_FOUND)
      set(FLASH_MLA_HIGHWAY_VERSION ${highway_pc_VERSION})
      pkg_get_variable(highway_include libhwy includedir)
      set(highway_source "pkg-config")
    endif()
  endif()
endif()

if(NOT FLASH_MLA_HIGHWAY_VERSION)
  if(NOT FETCHCONTENT_SOURCE_DIR_HIGHWAY)
    message(
      STATUS
        "Highway 1.0 or later is not installed (looked for a CMake package hwy and for pkg-config's libhwy); "
        "downloading ${highway_release}. Without a network install libhwy-dev 1.0 or later, or pass "
        "-DFETCHCONTENT_SOURCE_DIR_HIGHWAY=DIR with its sources.")
  endif()
  include(FetchContent)
  # SOURCE_SUBDIR without a CMakeLists.txt: headers only, nothing of it is built.
  FetchContent_Declare(
    highway
    GIT_REPOSITORY https://github.com/google/highway
    GIT_TAG ${highway_commit} # ${highway_release}
    SOURCE_SUBDIR hwy)
  FetchContent_MakeAvailable(highway)
  set(highway_include ${highway_SOURCE_DIR})
  set(FLASH_MLA_HIGHWAY_VERSION ${highway_release})
  set(highway_source ${highway_SOURCE_DIR})
endif()

if(NOT EXISTS "${highway_include}/hwy/highway.h")
  # A package that names no directory has its headers where the compiler looks anyway.
  include(CheckIncludeFileCXX)
  check_include_file_cxx(hwy/highway.h highway_is_found)
  if(NOT highway_is_found)
    message(FATAL_ERROR "Highway's headers: expected hwy/highway.h in \"${highway_include}\" (${highway_source})")
  endif()
else()
  target_include_directories(flash_mla_highway SYSTEM INTERFACE "$<BUILD_INTERFACE:${highway_include}>")
endif()
message(STATUS "Highway ${FLASH_MLA_HIGHWAY_VERSION} from ${highway_source}")
