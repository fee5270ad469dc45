#!/bin/sh
# Installs the library, static and shared, and builds and runs another project and the README's examples against it.
set -eu
cd "$(dirname "$0")/../.."
work=build/consumer
mkdir -p "$work"
# The README's blocks marked cpp and python that follow a line <!-- example -->.
awk -v dir="$work" '
  /^<!-- example -->$/ { marked = 1; next }
  marked && /^```/ { file = dir "/readme_example." ($0 == "```cpp" ? "cpp" : "py"); printf "" > file; marked = 0; inside = 1; next }
  inside && /^```$/ { inside = 0; close(file); next }
  inside { print >> file }
' README.md
for kind in OFF ON; do
  prefix="$PWD/$work/prefix-$kind"
  rm -rf "$prefix" "$work/use-$kind"
  cmake -S . -B "$work/build-$kind" -G Ninja -DBUILD_SHARED_LIBS=$kind -DCMAKE_INSTALL_PREFIX="$prefix" \
    -DCMAKE_BUILD_TYPE=Release -DFLASH_MLA_BUILD_CLI=OFF -DFLASH_MLA_BUILD_TESTS=OFF \
    $(command -v ccache >/dev/null 2>&1 && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache) \
    >"$work/configure.log" || {
    cat "$work/configure.log"
    exit 1
  }
  cmake --build "$work/build-$kind" --target install >"$work/install.log" || {
    cat "$work/install.log"
    exit 1
  }
  cmake -S tests/consumer -B "$work/use-$kind" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release \
    -DREADME_EXAMPLE="$PWD/$work/readme_example.cpp"
  cmake --build "$work/use-$kind"
  for program in consumer_cpp consumer_c readme_example; do
    "$work/use-$kind/$program"
    echo "$program: ok (BUILD_SHARED_LIBS=$kind)"
  done
done
.venv/bin/python "$work/readme_example.py"
echo "readme_example.py: ok"
