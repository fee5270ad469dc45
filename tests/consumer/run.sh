#!/bin/sh
# Installs the library, static (build/release, which must be built) and shared, each into an empty prefix, and
# builds and runs another project against it that uses the C++ API, the C ABI and the engine. The shared library exports no
# more than it must: that the engine, which is static, links with it is tested here.
set -eu
cd "$(dirname "$0")/../.."
work=build/consumer
mkdir -p "$work"

# quiet COMMAND...: its output only when it fails.
quiet() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

quiet cmake -S . -B build/shared -G Ninja -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release \
  -DFLASH_MLA_BUILD_CLI=OFF -DFLASH_MLA_BUILD_TESTS=OFF
quiet cmake --build build/shared

for build in release shared; do
  prefix="$PWD/$work/prefix-$build"
  rm -rf "$prefix" "$work/use-$build"
  quiet cmake --install "build/$build" --prefix "$prefix"
  quiet cmake -S tests/consumer -B "$work/use-$build" -G Ninja -DWITH_ENGINE=ON -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release
  quiet cmake --build "$work/use-$build"
  for program in consumer_cpp consumer_c; do
    "$work/use-$build/$program"
    echo "$program: ok (build/$build)"
  done
  "$work/use-$build/consumer_engine" models/small
  echo "consumer_engine: ok (build/$build)"
done
