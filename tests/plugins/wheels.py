"""Published wheels, downloaded once and not installed: their Python files and the names of all files in them."""

import ast
import os
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path

FOLDER = Path(os.environ.get("FLASH_MLA_WHEELS", "build/plugins/wheels"))


class Wheel:
    """A wheel's sources as syntax trees. Names are dotted: module("vllm.v1.attention.backend")."""

    def __init__(self, distribution, version):
        self.version = version
        self.release = tuple(int(part) for part in version.split(".")[:2])
        self.folder = FOLDER / f"{distribution}-{version}"
        if not (self.folder / "files.txt").exists():
            self._download(f"{distribution}=={version}")
        self.files = (self.folder / "files.txt").read_text().splitlines()

    def _download(self, requirement):
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "-q", "-d", str(self.folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        (wheel,) = self.folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            for name in names:
                if name.endswith(".py"):
                    archive.extract(name, self.folder)
        wheel.unlink()
        (self.folder / "files.txt").write_text("\n".join(names) + "\n")

    @lru_cache(maxsize=None)  # noqa: B019
    def module(self, name):
        path = self.folder.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert path.is_file(), f"{self.folder.name} has no module {name}"
        return ast.parse(path.read_text())

    def names(self, module):
        """What a module's top level defines or imports, under ``if`` and ``try`` too."""
        found = set()
        for node in _top_level(self.module(module)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        return found

    def function(self, module, name):
        return next(n for n in _top_level(self.module(module)) if isinstance(n, ast.FunctionDef) and n.name == name)

    def classes(self, module, name):
        """The class and its bases, nearest first, as far as this wheel defines them."""
        tree = self.module(module)
        for node in _top_level(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                found = [node]
                for base in node.bases:
                    base = base.value if isinstance(base, ast.Subscript) else base
                    if isinstance(base, ast.Name):
                        found += self.classes(module, base.id)
                return found
            if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
                return self.classes(node.module, name) if (node.module or "").split(".")[0] in ("vllm", "sglang") else []
        return []

    def members(self, module, name):
        """Methods and class attributes of a class and its bases: name -> node, the nearest."""
        found = {}
        for cls in self.classes(module, name):
            for node in cls.body:
                if isinstance(node, ast.FunctionDef):
                    found.setdefault(node.name, node)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.setdefault(node.target.id, node)
                elif isinstance(node, ast.Assign):
                    for target in node.targets:
                        if isinstance(target, ast.Name):
                            found.setdefault(target.id, node)
        return found

    def assigned(self, module, name):
        """The attributes that the methods of a class and its bases give ``self``."""
        found = set()
        for cls in self.classes(module, name):
            for node in ast.walk(cls):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    if isinstance(node.value, ast.Name) and node.value.id == "self":
                        found.add(node.attr)
        return found


def _top_level(tree):
    for node in tree.body:
        yield node
        for block in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                for inner in getattr(node, block, []):
                    yield from _top_level(ast.Module(inner.body if isinstance(inner, ast.ExceptHandler) else [inner], []))


def parameters(function):
    """Names of a function's parameters without self and cls, and whether each has a default."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first = len(positional) - len(arguments.defaults)
    named = {a.arg: i >= first for i, a in enumerate(positional)}
    named.update({a.arg: default is not None for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults)})
    return {name: default for name, default in named.items() if name not in ("self", "cls")}


def calls_of(tree, attribute):
    """Every call of something.attribute(...)."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute
    ]
