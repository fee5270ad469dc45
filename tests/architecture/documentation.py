#!/usr/bin/env python3
"""Whether the documentation agrees with the tree.

    python3 tests/architecture/documentation.py [ROOT]

Exit code 1, with file and line of each, if a page names in `backticks` a path that does not exist, if a page
docs/life-of-*.md names a function() that no source file does, if docs/api.md leaves a public header out, or if
docs/architecture.md leaves a room out or draws other arrows than tests/architecture/arrows.py allows.
"""

import pathlib
import re
import sys

import arrows

PATH = re.compile(r"`((?:\.ci|bench|cmake|data|deploy|docs|include|models|python|requirements|src|tests|tools)/[^`\s]*)`")
FUNCTION = re.compile(r"`((?:\w+::)*~?\w+)\(\)`")
# Words in capitals stand for something: `tests/fuzz/corpus/FUZZER`.
PLACEHOLDER = re.compile(r"[A-Z]{3,}")
SOURCES = ("src", "include", "python")
SUFFIXES = {".h", ".cuh", ".c", ".cpp", ".cu", ".py"}


def pages(root):
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def exists(root, name):
    if PLACEHOLDER.search(name.replace("README", "").replace("CONTRIBUTING", "")):
        return True
    return any(root.glob(name.rstrip("/"))) if "*" in name else (root / name).exists()


def expand(name):
    """`src/{a,b}/c` is two paths."""
    match = re.search(r"\{([^}]*)\}", name)
    if not match:
        return [name]
    return [path for word in match[1].split(",") for path in expand(name[: match.start()] + word + name[match.end() :])]


def drawn_arrows(picture):
    """The solid arrows between rooms in a flow chart: lines such as `api --> schedule & kernels`."""
    found = set()
    for line in picture.splitlines():
        match = re.fullmatch(r"\s*([\w\s&]+) --> ([\w\s&]+)", line)
        if match:
            heads, tails = (re.split(r"\s*&\s*", side.strip()) for side in match.groups())
            found |= {(head, tail) for head in heads for tail in tails}
    return {(head, tail) for head, tail in found if head in arrows.ARROWS and tail in arrows.ARROWS}


def check(root):
    complaints = []
    text = "\n".join(
        p.read_text(encoding="utf-8") for top in SOURCES for p in (root / top).rglob("*") if p.suffix in SUFFIXES
    )
    words = set(re.findall(r"\w+", text))
    for page in pages(root):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{page.relative_to(root)}:{number}"
            if page.name != "CHANGELOG.md":  # it tells of the past
                missing = [p for name in PATH.findall(line) for p in expand(name) if not exists(root, p)]
                complaints += [f"{where}: {name} does not exist" for name in missing]
            if page.name.startswith("life-of-"):
                unknown = [name for name in FUNCTION.findall(line) if any(w not in words for w in name.split("::"))]
                complaints += [f"{where}: no source file has {name}" for name in unknown]
    architecture = (root / "docs/architecture.md").read_text(encoding="utf-8")
    for room in sorted(p for p in (root / "src").iterdir() if p.is_dir()):
        if f"`src/{room.name}/`" not in architecture:
            complaints.append(f"docs/architecture.md: its table leaves out src/{room.name}/")
    api = (root / "docs/api.md").read_text(encoding="utf-8")
    headers = sorted(p.name for p in (root / "include/flash_mla").glob("*.h"))
    complaints += [f"docs/api.md: leaves out {name}" for name in headers if f"`{name}`" not in api]
    allowed = {(room, other) for room, others in arrows.ARROWS.items() for other in others}
    drawn = drawn_arrows(architecture)
    for room, other in sorted(allowed ^ drawn):
        complaints.append(f"docs/architecture.md: {'draws' if (room, other) in drawn else 'leaves out'} {room} -> {other}")
    return complaints


def main(arguments):
    complaints = check(pathlib.Path(arguments[0] if arguments else pathlib.Path(__file__).parents[2]))
    for line in complaints:
        print(line)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
