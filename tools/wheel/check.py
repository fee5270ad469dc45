"""Whether an installed wheel works where nothing else is: check.py MODEL. Run by the Python that has it."""

import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import flash_mla_kernels
from flash_mla_kernels import LLM, SamplingParams

PROMPT = "And it came to pass"
TOKENS = 8

assert not {"torch", "numpy"} & set(sys.modules)
program = Path(sys.executable).parent / "flash-mla"
version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.strip()
assert version == flash_mla_kernels.__version__, version
names = [backend["name"] for backend in flash_mla_kernels.backends()]
assert {"cpu", "sm90"} <= set(names), f"backends: {names}"

assert flash_mla_kernels.threading_info()["in_effect"]

# What is linked in has its terms beside it.
licences = {Path(file).name for file in files("flash_mla_kernels") if "licenses" in Path(file).parts}
(hopper,) = [backend for backend in flash_mla_kernels.backends() if backend["name"] == "sm90"]
expected = {"LICENSE", "nanobind.txt"} | (set() if "FLASH_MLA_CUDA=OFF" in hopper["detail"] else {"cuda-runtime.txt"})
assert expected <= licences, f"licences: {licences}"

# The program's words are the extension's: both have the whole engine.
options = ["--max-tokens", str(TOKENS), "--temperature", "0"]
command = [program, "generate", "--model", sys.argv[1], "--prompt", PROMPT, *options]
said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
(output,) = LLM(sys.argv[1]).generate([PROMPT], SamplingParams(max_tokens=TOKENS, temperature=0))
assert output.text.strip() and output.text in said, f"{output.text!r} is not in {said!r}"
print(f"{Path(flash_mla_kernels.__file__).parent}: {version}, backends {', '.join(names)}, {PROMPT + output.text!r}")
