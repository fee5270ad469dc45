#!/usr/bin/env python3
"""Which room may include which: reads every #include "..." of src/, include/ and python/src and names, by file and
line, each one that points against the arrows of docs/architecture.md.

    python3 tests/architecture/arrows.py [ROOT]

Exit code 1 if there is one, or if KNOWN_EXCEPTIONS names one that is no longer there: that list only shrinks.
"""

import os
import pathlib
import re
import sys

# Room: what its files may include besides the room itself, `base` and the public headers (`include`).
ARROWS = {
    "include": (),
    "base": (),
    "schedule": (),
    # Kernels know what a cache page looks like.
    "kernels": ("schedule", "kv"),
    "api": ("schedule", "kernels", "kv"),
    "kv": (),
    "checkpoint": (),
    "text": (),
    "comm": (),
    "model": ("checkpoint", "comm", "kv", "kernels"),
    "grammar": (),
    "transfer": (),
    "engine": ("model", "kv", "text", "grammar", "transfer"),
    "server": (),
    "planner": (),
    # The harness measures what the public headers do not show: kernels, and the steps of a model in a shape that the
    # planner ships. It fills pages of caches and reads them back without the library.
    "bench": ("kernels", "kv", "checkpoint", "model", "engine", "planner"),
    "cli": ("bench", "server", "planner"),
    # The door binds the public headers; a model's text is part of its own interface.
    "python": ("text",),
}

# The only public headers that a room may include, where that is not all of them.
PUBLIC_HEADERS = {
    "server": ("flash_mla/engine.h", "flash_mla/error.h"),
}

# Rooms that see a kernel through its header alone: device code is the kernels' own business.
NO_DEVICE_CODE = ("api", "model", "bench", "cli")

# (file, what it includes): arrows still to be mended.
KNOWN_EXCEPTIONS = {
    # flash_mla_kernels.model runs a forward pass, for which there is no public header.
    ("python/src/forward_bindings.cpp", "model/model.h"),
    # The tokens that end a sentence: the model could say them.
    ("src/engine/engine.cpp", "checkpoint/config.h"),
    # The host draws with the very arithmetic of the kernels, so that both give the same token.
    ("src/engine/sampler.h", "kernels/sampling/cpu/draw.h"),
}

# Headers that CMake writes, and protoc.
GENERATED = re.compile(r"(flash_mla_(commit|presets|status_page)|lmcache\.grpc\.pb)\.h$")

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')
SOURCE_SUFFIXES = {".h", ".cuh", ".c", ".cpp", ".cu", ".in"}


def room_of(path):
    """The room of a file, given by its path from the root."""
    return path.parts[1] if path.parts[0] == "src" else path.parts[0]


def resolve(root, source, name):
    """The path from the root of the file that an include names, or None: beside it, in src/ or in include/."""
    for folder in (source.parent, pathlib.Path("src"), pathlib.Path("include")):
        if (root / folder / name).is_file():
            return pathlib.Path(os.path.normpath(folder / name))
    return None


def complaint(source, target, name):
    """What is wrong with `source` including `target`, or None."""
    here, there = room_of(source), room_of(target)
    if there == here:
        return None
    if there == "include":
        headers = PUBLIC_HEADERS.get(here)
        if headers is None or name in headers:
            return None
        return f"of the public headers {here} may include {' and '.join(headers)}"
    if there != "base" and there not in ARROWS[here]:
        return f"{here} may include {', '.join(('itself', 'base', 'include', *ARROWS[here]))}"
    if there == "kernels" and here in NO_DEVICE_CODE and target.suffix == ".cuh":
        return f"{here} may include a kernel's .h, not its device code"
    return None


def check(root, exceptions):
    """The list of complaints about the tree at `root`."""
    complaints, used = [], set()
    files = (p.relative_to(root) for top in ("include", "src", "python/src") for p in (root / top).rglob("*"))
    for source in sorted(p for p in files if p.suffix in SOURCE_SUFFIXES):
        if room_of(source) not in ARROWS:
            complaints.append(f"{source}: the room {room_of(source)} has no arrows in tests/architecture/arrows.py")
            continue
        for number, line in enumerate((root / source).read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            if not match or GENERATED.match(match[1]):
                continue
            target = resolve(root, source, match[1])
            wrong = complaint(source, target, match[1]) if target else "no such file in its folder, src or include"
            if wrong and (str(source), match[1]) in exceptions:
                used.add((str(source), match[1]))
            elif wrong:
                complaints.append(f'{source}:{number}: #include "{match[1]}": {wrong}')
    for source, name in sorted(exceptions - used):
        complaints.append(f'KNOWN_EXCEPTIONS: {source} no longer includes "{name}" against the arrows; take it out')
    return complaints


def main(arguments):
    root = pathlib.Path(arguments[0] if arguments else pathlib.Path(__file__).parents[2])
    complaints = check(root, set(KNOWN_EXCEPTIONS))
    for line in complaints:
        print(line)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
