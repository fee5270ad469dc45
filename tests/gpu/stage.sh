#!/bin/sh
# tests/gpu/stage.sh BUILD FOLDER: copies what the GPU tests and the benchmark need from a build tree into FOLDER, to be
# carried to a machine with a GPU and run there as FOLDER/run.sh and, with FOLDER/lib in LD_LIBRARY_PATH,
# FOLDER/flash-mla bench. The Python package is installed there on its own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$1
folder=$2
mkdir -p "$folder/lib"
cp "$build/tests/gpu/gpu_tests" "$build/tests/gpu/conformance_gpu" "$build/tests/gpu/model_kernels_gpu" \
  "$build/tests/gpu/weight_stream_rows" "$build/tests/gpu/fp8_gemm_rows" "$build/tests/gpu/all_reduce_norm_rows" "$build/tests/gpu/sparse_decode_rows" "$build/tests/gpu/top_k_rows" "$build/tests/gpu/indexer_rows" "$build/src/cli/flash-mla" "$here/run.sh" "$here/test_torch_cuda.py" "$folder/"
programs="$folder/gpu_tests $folder/flash-mla"
if [ -x "$build/tests/gpu/engine_gpu" ]; then
  cp "$build/tests/gpu/engine_gpu" "$here/../../bench/compare_transformers_gpu.py" "$folder/"
  cp -r "$here/../../models/small" "$here/../../models/small-sparse" "$folder/"
  programs="$programs $folder/engine_gpu"
fi
# Libraries that machine may lack.
# shellcheck disable=SC2086
ldd $programs | awk '$1 ~ /^lib(hwy|fmt|gomp|dnnl|pcre2-8|OpenCL|tbb|prometheus-cpp-core)\./ { print $3 }' | sort -u | xargs -I{} cp {} "$folder/lib/"
