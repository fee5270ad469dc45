#!/bin/sh
# run.sh [ARGUMENT...]: the tests of pages at LMCache's server, which is installed into an environment of its own, and at
# Debian's Redis behind it. Called by ./run kv-test, which builds the program. Arguments are pytest's.
set -eu
cd "$(dirname "$0")/../.."

lmcache=0.5.6
work=build/lmcache
venv=$work/venv

# pip_quietly ARGUMENT...: what pip says goes to a log, which is shown when it fails.
pip_quietly() {
  "$venv/bin/python" -m pip --disable-pip-version-check install "$@" >"$work/pip.log" 2>&1 || {
    cat "$work/pip.log" >&2
    exit 1
  }
}

mkdir -p "$work"
[ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv"
if ! cmp -s requirements/lmcache.txt "$venv/$lmcache.stamp"; then
  echo "run: installing lmcache $lmcache and requirements/lmcache.txt into $venv" >&2
  pip_quietly ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements/lmcache.txt
  pip_quietly --no-deps "lmcache==$lmcache"
  cp requirements/lmcache.txt "$venv/$lmcache.stamp"
fi
exec "$venv/bin/python" -m pytest -q -rA --tb=short tests/lmcache "$@"
