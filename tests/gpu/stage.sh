#!/bin/sh
# tests/gpu/stage.sh BUILD FOLDER: copies what the GPU tests need from a build tree into FOLDER, to be carried to a
# machine with a GPU and run there as FOLDER/run.sh. The Python package is installed there on its own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$1
folder=$2
mkdir -p "$folder/lib"
cp "$build/tests/gpu/gpu_tests" "$build/tests/gpu/conformance_gpu" "$build/tests/gpu/model_kernels_gpu" \
  "$build/tests/gpu/weight_stream_rows" "$here/run.sh" "$here/test_torch_cuda.py" "$folder/"
# Libraries that machine may lack.
ldd "$folder/gpu_tests" | awk '$1 ~ /^lib(hwy|gomp)\./ { print $3 }' | xargs -I{} cp {} "$folder/lib/"
