#!/bin/sh
# Runs the GPU tests of a prebuilt tree on a machine with a Hopper GPU. No compiler and no network are needed.
#
#   tests/gpu/run.sh [--quick] [--sanitize] [BUILD]
#
# BUILD is a build tree (default: build/release) or a folder that tests/gpu/stage.sh made; a staged copy of this script
# takes its own folder. The Python tests run when PYTHON (default: python3) can import torch with CUDA
# and flash_mla_kernels. --quick leaves out the large grid; --sanitize runs a reduced grid under compute-sanitizer as well.
# The last line is "N passed, M failed", counting programs.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
quick=
sanitize=
build=
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    --sanitize) sanitize=1 ;;
    -*)
      echo "run.sh: unknown option $argument; expected --quick or --sanitize" >&2
      exit 2
      ;;
    *) build=$argument ;;
  esac
done

# find_program NAME: in a staged folder or in a build tree.
find_program() {
  for candidate in ${build:+"$build/$1" "$build/tests/gpu/$1" "$build/src/cli/$1"} "$here/$1" \
    "$root/build/release/tests/gpu/$1" "$root/build/release/src/cli/$1"; do
    [ -x "$candidate" ] && printf '%s' "$candidate" && return 0
  done
  echo "run.sh: $1 is not in ${build:-build/release}; build it with ./run build or name the folder" >&2
  return 1
}

# Staged libraries.
if [ -d "${build:-$here}/lib" ]; then export LD_LIBRARY_PATH="${build:-$here}/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi

passed=0
failed=0
step() {
  name=$1
  shift
  echo "=== $name"
  begin=$(date +%s)
  if "$@"; then
    passed=$((passed + 1))
    echo "=== $name: passed ($(($(date +%s) - begin)) s)"
  else
    failed=$((failed + 1))
    echo "=== $name: FAILED ($(($(date +%s) - begin)) s)"
  fi
}

gpu_tests=$(find_program gpu_tests) || exit 2
conformance=$(find_program conformance_gpu) || exit 2
model_kernels=$(find_program model_kernels_gpu) || exit 2
all_reduce_norm=$(find_program all_reduce_norm_rows) || exit 2
step "conformance suite on the GPU" "$conformance" --gtest_brief=1
if [ -n "$quick" ]; then
  step "GPU tests without the large grid" "$gpu_tests" --gtest_brief=1 '--gtest_filter=-*k4096*'
else
  step "GPU tests" "$gpu_tests" --gtest_brief=1
fi
step "the model's kernels" "$model_kernels" --gtest_brief=1
step "sums over ranks, on streams" "$all_reduce_norm" --quick
if engine=$(find_program engine_gpu); then
  small=$root/models/small
  if [ ! -d "$small" ]; then small=$here/small; fi
  export FLASH_MLA_SMALL_SPARSE_MODEL="$small-sparse"
  # torch brings cuBLAS, where the system does not.
  if [ -z "${FLASH_MLA_CUBLASLT:-}" ] && ! ldconfig -p | grep -q libcublasLt.so.13; then
    FLASH_MLA_CUBLASLT=$("$python" -c 'import nvidia.cu13 as n; print(list(n.__path__)[0])' 2>/dev/null)/lib/libcublasLt.so.13
    export FLASH_MLA_CUBLASLT
  fi
  step "the engine" env FLASH_MLA_SMALL_MODEL="$small" "$engine" --gtest_brief=1
else
  echo "=== the engine: FAILED, the build has no engine_gpu (cublasLt.h was missing: ./run build fetches it)"
  failed=$((failed + 1))
fi
if program=$(find_program flash-mla); then
  step "benchmark with its check" "$program" bench --device cuda --b 1,32 --h-q 16,128 --s-k 1024 -q
else
  failed=$((failed + 1))
fi
if "$python" -c 'import torch, flash_mla_kernels; assert torch.cuda.is_available()' 2>/dev/null; then
  step "Python on the GPU" "$python" -m pytest -q -p no:cacheprovider "$here/test_torch_cuda.py"
else
  echo "=== Python on the GPU: FAILED, $python cannot import torch with CUDA and flash_mla_kernels"
  failed=$((failed + 1))
fi
if [ -n "$sanitize" ]; then
  for tool in memcheck racecheck synccheck initcheck; do
    step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu_tests" --gtest_brief=1 \
      '--gtest_filter=Decode.ZeroLengthMixes:*b2_k140*:Prefill.WithoutLse:Prefill.NaN*'
  done
  step "compute-sanitizer memcheck of drawn tokens" compute-sanitizer --error-exitcode 9 "$model_kernels" --gtest_brief=1 \
    '--gtest_filter=DrawRows.Are*:TokenRules.Change*'
  if [ -n "${engine:-}" ]; then
    step "compute-sanitizer memcheck of the engine" env FLASH_MLA_SMALL_MODEL="$small" compute-sanitizer --error-exitcode 9 \
      "$engine" --gtest_brief=1 '--gtest_filter=*Draws*v3_plain:*LaunchedAhead*v2_lite:*Overlapped*'
  fi
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
