# FLASH_MLA_CUDA = AUTO, ON or OFF: whether the Hopper backend is built. Sets FLASH_MLA_WITH_CUDA. Only the
# compiler is needed here, neither a GPU nor a driver.

set(FLASH_MLA_CUDA AUTO CACHE STRING "Build the sm90 backend: AUTO (when nvcc is found), ON or OFF")
set_property(CACHE FLASH_MLA_CUDA PROPERTY STRINGS AUTO ON OFF)

set(FLASH_MLA_WITH_CUDA OFF)
if(FLASH_MLA_CUDA STREQUAL "AUTO" OR FLASH_MLA_CUDA)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(FLASH_MLA_NVCC nvcc PATHS /usr/local/cuda/bin)
    mark_as_advanced(FLASH_MLA_NVCC)
    if(FLASH_MLA_NVCC)
      set(CMAKE_CUDA_COMPILER "${FLASH_MLA_NVCC}")
    endif()
  endif()
  # The kernels use wgmma and setmaxnreg, which only sm_90a has.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(FLASH_MLA_WITH_CUDA ON)
  elseif(NOT FLASH_MLA_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FLASH_MLA_CUDA is ${FLASH_MLA_CUDA}, but no CUDA compiler was found: set CMAKE_CUDA_COMPILER")
  endif()
endif()
message(STATUS "flash_mla: sm90 backend ${FLASH_MLA_WITH_CUDA}")

# What .cu files of this project are compiled with.
function(flash_mla_cuda_defaults target)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES 90a-real CUDA_VISIBILITY_PRESET hidden
                                             CUDA_RUNTIME_LIBRARY Static)
  # As an option: CMake before 3.26 does not know that nvcc compiles C++20.
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--expt-relaxed-constexpr>")
  if(FLASH_MLA_WERROR)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>")
  endif()
endfunction()
