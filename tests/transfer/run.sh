#!/bin/sh
# run.sh: prefill and decode apart over NIXL, and 1,000 random requests over each transport. Called by ./run
# transfer-test, which builds what it runs. NIXL comes from PyPI into an environment of its own, build/transfer.
set -eu
cd "$(dirname "$0")/../.."

work=build/transfer
venv=$work/venv
mkdir -p "$work"
[ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv"
if ! cmp -s requirements/transfer.txt "$venv/transfer.stamp"; then
  echo "run: installing requirements/transfer.txt into $venv" >&2
  "$venv/bin/python" -m pip --disable-pip-version-check install --no-deps -r requirements/transfer.txt >"$work/pip.log" 2>&1 || {
    cat "$work/pip.log" >&2
    exit 1
  }
  cp requirements/transfer.txt "$venv/transfer.stamp"
fi
FLASH_MLA_NIXL=$(find "$PWD/$venv" -name libnixl_capi.so | head -n 1)
[ -n "$FLASH_MLA_NIXL" ] || {
  echo "run: no libnixl_capi.so in $venv" >&2
  exit 1
}
build=${FLASH_MLA_BUILD:-build/release}
export FLASH_MLA_PROGRAM="$PWD/$build/src/cli/flash-mla" FLASH_MLA_TRANSFER_REQUESTS="${FLASH_MLA_TRANSFER_REQUESTS:-1000}"

echo "== shm" >&2
"$build/tests/engine/engine_test" --gtest_filter='PeerTest.RandomRequestsLeakNothing'
TRANSPORT=shm "$venv/bin/python" -m pytest -q -s --noconftest tests/python/test_disaggregated.py -k many
echo "== nixl" >&2
export FLASH_MLA_NIXL
"$build/tests/transfer/transfer_test"
"$build/tests/engine/engine_test" --gtest_filter='*Peer*'
TRANSPORT=nixl "$venv/bin/python" -m pytest -q -s --noconftest tests/python/test_disaggregated.py
