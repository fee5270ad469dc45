import ast
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import flash_mla_kernels


def test_the_extension_needs_no_highway_at_run_time():
    with open(flash_mla_kernels._C.__file__, "rb") as f:
        assert b"libhwy" not in f.read()


def test_the_stubs_of_the_extension_are_python():
    ast.parse(Path(flash_mla_kernels.__file__).with_name("_C.pyi").read_text())


# ------------------------------------------------------------------ the alias flash_mla (python/alias)


def files(distribution):
    """What its wheel laid down, without what pip and Python made there."""
    names = [str(file) for file in importlib.metadata.files(distribution)]
    return {name for name in names if "__pycache__" not in name and not name.startswith("..")}


def folders(distribution):
    return {name.split("/")[0] for name in files(distribution) if ".dist-info/" not in name}


def public_modules():
    return sorted(m.name for m in pkgutil.iter_modules(flash_mla_kernels.__path__) if not m.name.startswith("_"))


def run(code, *arguments, folder):
    return subprocess.run([sys.executable, *arguments, "-c", code], cwd=folder, capture_output=True, text=True)


def test_no_file_of_either_wheel_is_where_another_package_called_flash_mla_has_its_own():
    assert folders("flash_mla_kernels") == {"flash_mla_kernels"}
    assert folders("flash_mla") == {"flash_mla_alias.py", "flash_mla_alias.pth", "flash_mla-stubs"}
    assert not files("flash_mla_kernels") & files("flash_mla")


def test_the_alias_is_of_the_same_version():
    assert importlib.metadata.version("flash_mla") == importlib.metadata.version("flash_mla_kernels")
    assert importlib.metadata.requires("flash_mla") == [f"flash-mla-kernels=={flash_mla_kernels.__version__}"]


def test_every_name_of_the_alias_is_the_packages_own():
    import flash_mla

    names = {}
    exec("from flash_mla import *", names)
    for name in flash_mla_kernels.__all__:
        assert names[name] is getattr(flash_mla, name) is getattr(flash_mla_kernels, name)
    assert flash_mla.__version__ == flash_mla_kernels.__version__
    assert flash_mla._interface is flash_mla_kernels._interface
    assert set(flash_mla_kernels.__all__) <= set(dir(flash_mla))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flash_mla.nothing  # noqa: B018


@pytest.mark.parametrize("name", [*public_modules(), "_interface", "_C"])
def test_every_submodule_of_the_alias_is_the_packages_own(name, tmp_path):
    """In a process of its own for each: what was imported before must not matter."""
    code = f"""
import flash_mla.{name} as alias, sys
import flash_mla_kernels.{name} as real
assert alias is real and alias is sys.modules["flash_mla_kernels.{name}"]
assert real.__name__ == real.__spec__.name == "flash_mla_kernels.{name}", real.__spec__
from flash_mla import {name}
assert {name} is real
"""
    done = run(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_unknown_submodule_of_the_alias_is_named():
    with pytest.raises(ModuleNotFoundError, match="No module named 'flash_mla.nothing'"):
        import flash_mla.nothing  # noqa: F401


def test_a_submodule_of_the_alias_is_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "flash_mla.plot"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage: python -m flash_mla_kernels.plot RESULT.json TARGET" in done.stderr


def test_a_package_called_flash_mla_goes_before_the_alias_and_a_mere_folder_does_not(tmp_path):
    (tmp_path / "flash_mla").mkdir()
    code = "import flash_mla; print(flash_mla.__spec__.origin)"
    assert run(code, folder=tmp_path).stdout == "alias of flash_mla_kernels\n"
    package = tmp_path / "flash_mla" / "__init__.py"
    package.write_text("")
    (tmp_path / "flash_mla" / "planner.py").write_text("theirs = True\n")
    assert run(code, folder=tmp_path).stdout == f"{package}\n"
    done = run("import flash_mla.planner; print(flash_mla.planner.theirs)", folder=tmp_path)
    assert done.stdout == "True\n", done.stderr


def test_the_alias_is_loaded_only_when_it_is_asked_for(tmp_path):
    done = run("import sys; print('flash_mla_alias' in sys.modules, 'flash_mla_kernels' in sys.modules)", folder=tmp_path)
    assert done.stdout == "True False\n"


def test_the_alias_has_stubs_for_every_public_module():
    stubs = Path(importlib.metadata.distribution("flash_mla").locate_file("flash_mla-stubs"))
    assert sorted(path.stem for path in stubs.glob("*.pyi")) == ["__init__", *public_modules()]
    for name in public_modules():
        assert (stubs / f"{name}.pyi").read_text() == f"from flash_mla_kernels.{name} import *\n"
