#!/bin/sh
# run.sh WORK: Highway from its CMake package, from pkg-config, and, where both are missing or too old, from a
# download (stood in for by the installed headers: nothing here needs a network).
set -eu
cd "$(dirname "$0")"
work=$1
rm -rf "$work"
mkdir -p "$work/old" "$work/download/_deps/highway-src" "$work/tree"
headers=$(pkg-config --variable=includedir libhwy)
ln -s "$headers/hwy" "$work/download/_deps/highway-src/hwy"
ln -s "$headers/hwy" "$work/tree/hwy"
# What Ubuntu 22.04 has.
printf 'Name: libhwy\nDescription: too old\nVersion: 0.16.0\nincludedir=/nowhere\n' >"$work/old/libhwy.pc"

# expect NAME TEXT ARGUMENT...: the configuration says TEXT, and what it configured builds and runs.
expect() {
  name=$1 text=$2
  shift 2
  cmake -S . -B "$work/$name" "$@" >"$work/$name.log" 2>&1 || { cat "$work/$name.log" >&2; exit 1; }
  grep -qF -e "$text" "$work/$name.log" || { cat "$work/$name.log" >&2; echo "$name: expected \"$text\"" >&2; exit 1; }
  cmake --build "$work/$name" >>"$work/$name.log" 2>&1 || { cat "$work/$name.log" >&2; exit 1; }
  "$work/$name/main"
  echo "$name: ok"
}

expect package "from its CMake package"
expect pkg-config "from pkg-config" -DCMAKE_DISABLE_FIND_PACKAGE_hwy=ON
export PKG_CONFIG_LIBDIR="$work/old"
expect download "downloading 1.0" -DCMAKE_DISABLE_FIND_PACKAGE_hwy=ON -DFETCHCONTENT_FULLY_DISCONNECTED=ON
expect source-tree "from $work/tree" "-DFETCHCONTENT_SOURCE_DIR_HIGHWAY=$work/tree"
