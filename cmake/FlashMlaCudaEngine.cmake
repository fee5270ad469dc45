# Whether the engine runs models on Hopper GPUs: FLASH_MLA_CUDA_ENGINE, or why not: FLASH_MLA_NO_CUDA_ENGINE. cuBLASLt's
# headers are needed here, its library not before a model is loaded.
set(FLASH_MLA_CUBLAS_INCLUDE "" CACHE PATH "Folder with cublasLt.h, where the CUDA toolkit has none (also: environment)")

set(FLASH_MLA_CUDA_ENGINE OFF)
if(NOT FLASH_MLA_WITH_CUDA)
  set(FLASH_MLA_NO_CUDA_ENGINE "this build was made without CUDA: use cpu, or build with FLASH_MLA_CUDA=ON")
else()
  find_file(FLASH_MLA_CUBLASLT_H cublasLt.h PATHS ${CUDAToolkit_INCLUDE_DIRS} ${FLASH_MLA_CUBLAS_INCLUDE}
                                                 ENV FLASH_MLA_CUBLAS_INCLUDE)
  mark_as_advanced(FLASH_MLA_CUBLASLT_H)
  if(FLASH_MLA_CUBLASLT_H)
    set(FLASH_MLA_CUDA_ENGINE ON)
    get_filename_component(FLASH_MLA_CUBLASLT_INCLUDE "${FLASH_MLA_CUBLASLT_H}" DIRECTORY)
  else()
    set(FLASH_MLA_NO_CUDA_ENGINE
        "this build was made without cublasLt.h (Debian package libcublas-dev-13-0, Python package nvidia-cublas): use cpu")
  endif()
endif()
message(STATUS "flash_mla: CUDA engine ${FLASH_MLA_CUDA_ENGINE}${FLASH_MLA_NO_CUDA_ENGINE}")
