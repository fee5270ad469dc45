"""flash_mla_kernels under the name that callers of FlashMLA import.

Nothing is in here: each name and each submodule is flash_mla_kernels' own. For environments where no other package is
called flash_mla; SGLang's sgl-flash-mla is, and there flash_mla_kernels is installed alone.
"""

import importlib
import importlib.abc
import importlib.util
import sys

import flash_mla_kernels
from flash_mla_kernels import *  # noqa: F403
from flash_mla_kernels import __all__, __version__  # noqa: F401


def _real_name(name):
    return flash_mla_kernels.__name__ + name[len(__name__) :]


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds flash_mla.planner in flash_mla_kernels.planner: the same module, not a second copy of it."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(__name__ + ".") or importlib.util.find_spec(_real_name(name)) is None:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=False)

    def create_module(self, spec):
        module = importlib.import_module(_real_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        # It has been executed under its own name, which the import system has just replaced.
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name):
        """For python -m flash_mla.plot."""
        return importlib.util.find_spec(_real_name(name)).loader.get_code(_real_name(name))

    def get_source(self, name):
        return importlib.util.find_spec(_real_name(name)).loader.get_source(_real_name(name))


sys.meta_path.insert(0, _Submodules())


def __getattr__(name):
    return getattr(flash_mla_kernels, name)
