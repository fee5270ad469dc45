#!/bin/sh
# Installs the library, static and shared, each into an empty prefix, and builds and runs another project
# against it that uses the C++ API and the C ABI.
set -eu
cd "$(dirname "$0")/../.."
work=build/consumer
mkdir -p "$work"
launcher=
command -v ccache >/dev/null 2>&1 && launcher=-DCMAKE_CXX_COMPILER_LAUNCHER=ccache

# quiet COMMAND...: its output only when it fails.
quiet() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

for shared in OFF ON; do
  prefix="$PWD/$work/prefix-$shared"
  rm -rf "$prefix" "$work/use-$shared"
  quiet cmake -S . -B "$work/build-$shared" -G Ninja -DBUILD_SHARED_LIBS=$shared -DCMAKE_INSTALL_PREFIX="$prefix" \
    -DCMAKE_BUILD_TYPE=Release -DFLASH_MLA_BUILD_CLI=OFF -DFLASH_MLA_BUILD_TESTS=OFF $launcher
  quiet cmake --build "$work/build-$shared" --target install
  quiet cmake -S tests/consumer -B "$work/use-$shared" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release
  quiet cmake --build "$work/use-$shared"
  for program in consumer_cpp consumer_c; do
    "$work/use-$shared/$program"
    echo "$program: ok (BUILD_SHARED_LIBS=$shared)"
  done
done
