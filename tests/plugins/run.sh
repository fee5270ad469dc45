#!/bin/sh
# run.sh [ARGUMENT...]: the tests of the plugins, in an environment with vLLM for CPUs and the wheels in build/wheel.
# Called by ./run plugin-test, which makes them. Arguments are pytest's.
set -eu
cd "$(dirname "$0")/../.."

work=build/plugins
venv=$work/venv

# pip_quietly COMMAND ARGUMENT...: what pip says goes to a log, which is shown when it fails.
pip_quietly() {
  "$venv/bin/python" -m pip --disable-pip-version-check "$@" >"$work/pip.log" 2>&1 || {
    cat "$work/pip.log" >&2
    exit 1
  }
}

mkdir -p "$work"
[ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv"
if ! cmp -s requirements/plugins.txt "$venv/plugins.stamp"; then
  echo "run: installing requirements/plugins.txt into $venv" >&2
  pip_quietly install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements/plugins.txt
  # They come built for CUDA's torch beside a torch for CPUs, and vLLM fails where they cannot be imported.
  pip_quietly uninstall -y torchvision torchaudio torchcodec
  cp requirements/plugins.txt "$venv/plugins.stamp"
fi
pip_quietly install --force-reinstall --no-deps build/wheel/*.whl
# shellcheck disable=SC2046
pip_quietly install $(sed -n 's/^requires = \[\(.*\)\]$/\1/p' python/plugins/vllm/pyproject.toml | tr -d '",')
pip_quietly install --force-reinstall --no-build-isolation --no-deps ./python/plugins/vllm ./python/plugins/sglang
FLASH_MLA_WHEELS="$PWD/$work/wheels" exec "$venv/bin/python" -m pytest -q tests/plugins "$@"
