#!/bin/sh
# run.sh [ARGUMENT...]: the worker under Dynamo's frontend, which is installed from PyPI into an environment of its own,
# build/dynamo. Called by ./run dynamo-test, which builds the package. Arguments are pytest's.
set -eu
cd "$(dirname "$0")/../.."

dynamo=1.6.1
work=build/dynamo
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
if ! cmp -s requirements/dynamo.txt "$venv/$dynamo.stamp"; then
  echo "run: installing ai-dynamo $dynamo and requirements/dynamo.txt into $venv" >&2
  pip_quietly -r requirements/dynamo.txt
  pip_quietly --no-deps "ai-dynamo==$dynamo"
  cp requirements/dynamo.txt "$venv/$dynamo.stamp"
fi
[ -n "${FLASH_MLA_OVERLAY:-}" ] || pip_quietly --force-reinstall --no-deps build/wheel/*.whl
exec "$venv/bin/python" -m pytest -q -rA --tb=short tests/dynamo "$@"
