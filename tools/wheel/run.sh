#!/bin/sh
# run.sh [PYTHON...]: wheels for other machines, in build/dist. Called by ./run wheel, which has installed what they are
# built with. One for each PYTHON (otherwise for those of 3.10, 3.11 and one from 3.12 on that this machine has; the last
# is for every later one too), with the program and the libraries inside; and those of the alias and the plugins.
set -eu
cd "$(dirname "$0")/../.."

MOST_BYTES=40000000
# Their headers are compiled in; the packages of the libraries that are put in are asked for.
HEADERS="libboost1.74-dev libcli11-dev libdlpack-dev libfmt-dev libhwy-dev libxxhash-dev nlohmann-json3-dev"

say() { printf 'wheel: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# logged FILE COMMAND...: what the command says goes to the file, which is shown when it fails.
logged() {
  log=$1
  shift
  "$@" >"$log" 2>&1 || {
    cat "$log" >&2
    exit 1
  }
}

# The interpreters of this machine by which wheels can be built.
pythons() {
  for versions in 3.10 3.11 "3.12 3.13 3.14"; do
    for version in $versions; do
      if "python$version" -c 'import sys' 2>/dev/null; then
        command -v "python$version"
        continue 2
      fi
    done
    say "no python$version here, so no wheel for it; name one: ./run wheel PYTHON..."
  done
}

# environment FOLDER PYTHON: a new one, always in the same place, so that the compiler cache knows nanobind's headers.
environment() {
  rm -rf "$1"
  "$2" -m venv "$1" || die "$2 cannot make a virtual environment"
}

pip() { "$environment/bin/python" -m pip --disable-pip-version-check "$@"; }

build_requirements() { sed -n 's/^requires = \[\(.*\)\]$/\1/p' "$@" | tr -d '",'; }

# What the licences of others ask to be passed on.
gather_licences() {
  rm -rf "$work/licences"
  mkdir -p "$work/licences"
  libraries=$(for library in libdnnl.so.2 libpcre2-8.so.0 libprometheus-cpp-core.so.1.0 libOpenCL.so.1 libgomp.so.1; do
    dpkg -S "*/$library" | sed -n '1s/:.*//p'
  done)
  for package in $HEADERS $libraries; do
    # Of Ubuntu's Boost the version is another.
    [ -f "/usr/share/doc/$package/copyright" ] || { say "no copyright file of $package here"; continue; }
    cp "/usr/share/doc/$package/copyright" "$work/licences/$package.txt"
  done
  gather_cuda_licence
}

# CUDA's runtime is linked in where there is a compiler for it, which is where ./run build looks for one. NVIDIA's
# installers put the terms at the toolkit's top, its Python packages beside the runtime's own metadata.
gather_cuda_licence() {
  nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
  [ -x "$nvcc" ] || return 0
  toolkit=$("$nvcc" -v -E -x cu /dev/null 2>&1 >/dev/null | sed -n 's/^#\$ TOP=//p')
  for file in "$toolkit"/EULA.txt "$toolkit"/LICENSE "$toolkit"/dist-info/nvidia_cuda_runtime-*/licenses/License.txt \
    "$toolkit"/../nvidia_cuda_runtime-*.dist-info/licenses/License.txt /usr/share/doc/libcudart*/copyright; do
    [ -f "$file" ] || continue
    cp "$file" "$work/licences/cuda-runtime.txt"
    return 0
  done
  die "no licence of CUDA's runtime below $toolkit, and the wheel must have it"
}

# build PYTHON
build() {
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$1 does not run"
  environment=$work/python$version
  environment "$environment" "$1"
  # shellcheck disable=SC2046
  logged "$work/pip.log" pip install $(build_requirements pyproject.toml) -r requirements/wheel.txt
  cp "$environment"/lib/python*/site-packages/nanobind-*.dist-info/licenses/LICENSE "$work/licences/nanobind.txt"
  rm -rf "$work/raw"
  say "building for $("$1" --version)"
  # The folder of the build stays, and is as deep as build/release: the compiler cache has most of it.
  logged "$work/build-$version.log" pip wheel --no-build-isolation --no-deps -w "$work/raw" . \
    --config-settings=build-dir="build/dist-$version" \
    --config-settings=wheel.py-api=cp312 \
    --config-settings=wheel.license-files="LICENSE;$work/licences/*.txt" \
    --config-settings=cmake.define.FLASH_MLA_BUILD_CLI=ON
  logged "$work/repair-$version.log" env PATH="$PWD/$environment/bin:$PATH" \
    "$environment/bin/auditwheel" repair -w build/dist "$work"/raw/*.whl
}

# What needs no compiler: any Python makes it.
build_plain() {
  # shellcheck disable=SC2046
  logged "$work/pip.log" pip install $(build_requirements python/alias/pyproject.toml)
  logged "$work/plain.log" pip wheel --no-build-isolation --no-deps -w build/dist ./python/alias ./python/plugins/vllm ./python/plugins/sglang
}

# check PYTHON: its wheel in a new environment, with an empty list of variables: it is small enough, decodes, and its
# program runs.
check() {
  environment=$work/check
  environment "$environment" "$1"
  logged "$work/pip.log" pip install --no-index --find-links build/dist flash_mla_kernels flash_mla
  logged "$work/check.log" env -i "$environment/bin/python" tools/wheel/check.py models/small
  tail -n 1 "$work/check.log" >&2
}

# Not the compiler that each Python was built with, but the one of ./run build, whose objects the compiler cache has.
export CC="${CC:-cc}" CXX="${CXX:-c++}"
work=build/dist-work
mkdir -p "$work"
rm -rf build/dist
[ $# -gt 0 ] || set -- $(pythons)
[ $# -gt 0 ] || die "no Python from 3.10 on here"
gather_licences
for python in "$@"; do build "$python"; done
build_plain
for python in "$@"; do check "$python"; done
for wheel in build/dist/*.whl; do
  bytes=$(wc -c <"$wheel")
  say "$wheel: $((bytes / 1000)) kB"
  [ "$bytes" -lt "$MOST_BYTES" ] || die "$wheel has $bytes bytes, expected fewer than $MOST_BYTES"
  case $wheel in
    *-any.whl | *manylinux*) ;;
    *) die "$wheel: no manylinux tag" ;;
  esac
done
