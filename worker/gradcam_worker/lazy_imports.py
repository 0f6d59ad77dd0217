"""Public names of a package that are imported when they are first asked for.

    if not TYPE_CHECKING:
        __getattr__, __dir__ = lazy_imports(__name__, {"Job": "gradcam_worker.schemas.job"})

A type checker reads the imports beside it instead: to it a module with `__getattr__` has every name.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from gradcam_worker import extras


def lazy_imports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__`.

    Args:
        package: The package's name.
        modules: By public name, the module that defines it.

    Returns:
        Both functions. `__getattr__` raises AttributeError for any other name, and MissingExtra for one that
        needs an extra.
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message)
        with extras.required(f"{package}.{name}"):
            return getattr(import_module(modules[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return import_name, names
