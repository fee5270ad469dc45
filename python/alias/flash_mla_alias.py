"""flash_mla_kernels under the name that callers of FlashMLA import.

No file of this distribution lies in a folder flash_mla: SGLang's sgl-flash-mla brings one, and pip would let each
overwrite the other's. A finder that Python's start registers (flash_mla_alias.pth) answers ``import flash_mla`` instead,
where no installed package does. Each name and each submodule is flash_mla_kernels' own.
"""

import sys

_ALIAS = "flash_mla"
_TARGET = "flash_mla_kernels"


class _Finder:
    """Python's start runs this module: importlib's helpers are loaded only when the name is asked for."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _ALIAS and not name.startswith(_ALIAS + "."):
            return None
        from importlib.util import find_spec, spec_from_loader

        if _elsewhere(path) if name == _ALIAS else getattr(sys.modules.get(_ALIAS), "__loader__", None) is not _Loader:
            return None
        real = find_spec(_real_name(name))
        if real is None:
            return None
        # A program run with -m takes its own path from here.
        origin = f"alias of {_TARGET}" if name == _ALIAS else real.origin
        is_package = name == _ALIAS or real.submodule_search_locations is not None
        return spec_from_loader(name, _Loader, origin=origin, is_package=is_package)

    @staticmethod
    def invalidate_caches():
        pass


def _elsewhere(path):
    """Whether another package has the name. A folder without __init__.py is none: a checkout of this repository would do."""
    for finder in sys.meta_path:
        if finder is not _Finder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(_ALIAS, path, None)
            if spec is not None and spec.origin is not None:
                return True
    return False


class _Loader:
    @staticmethod
    def create_module(spec):
        if spec.name == _ALIAS:
            return None
        from importlib import import_module

        module = import_module(_real_name(spec.name))
        # The import system is about to overwrite it; exec_module puts it back.
        spec.loader_state = module.__spec__
        return module

    @staticmethod
    def exec_module(module):
        if module.__name__ != _ALIAS:
            module.__spec__ = module.__spec__.loader_state
            return
        from importlib import import_module

        package = import_module(_TARGET)
        module.__doc__ = package.__doc__
        module.__all__ = package.__all__
        module.__version__ = package.__version__
        module.__getattr__ = lambda name: getattr(package, name)
        module.__dir__ = lambda: sorted({*vars(module), *dir(package)})

    @staticmethod
    def get_code(name):
        """For python -m flash_mla.plot."""
        return _real_loader(name).get_code(_real_name(name))

    @staticmethod
    def get_source(name):
        return _real_loader(name).get_source(_real_name(name))


def _real_name(name):
    return _TARGET + name[len(_ALIAS) :]


def _real_loader(name):
    from importlib.util import find_spec

    return find_spec(_real_name(name)).loader


def register():
    """Once a process, ahead of the finder that would take a folder without __init__.py for the package."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


register()
