"""Layers that an operator's model brings: the modules that define them, and what Keras says without them."""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from gradcam_worker import extras
from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.text.visible import ending

# Of Keras 3, and of Keras 2.
NOT_FOUND = re.compile(r"(?:Could not locate (?:class|function)|Unknown [a-z ]{1,40}:) '([^']{1,200})'")
HUB = re.compile(r"parent module keras_hub[.\w]* cannot be imported")
MAX_CONFIGURATION = 60  # characters of a configuration that a message keeps


class NotImported(Exception):
    """A module cannot be imported, for a reason whose end is the message."""

    def __init__(self, module: str, reason: str) -> None:
        """`module` is its name."""
        super().__init__(reason)
        self.module = module


def import_modules(row: NetworkRow) -> dict[str, type]:
    """Import the modules that the registry names for a network, so that their layers are found.

    Args:
        row: Of the registry.

    Returns:
        The layers and other parts of models in these modules, by class name: classes that are registered with
        Keras are found without it.

    Raises:
        NetworkIncompatible: A module cannot be imported.
    """
    try:
        return parts_of_models(row.imports)
    except NotImported as error:
        message = f"{row.name} needs {error.module} (imports in its table), which cannot be imported: {error}"
        raise NetworkIncompatible(message) from error


def parts_of_models(modules: Sequence[str]) -> dict[str, type]:
    """Import modules, and find the layers and other parts of models that they define, by class name.

    Raises NotImported.
    """
    return defined_in(modules, _is_part_of_models)


def defined_in(modules: Sequence[str], is_wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Import modules, and find what they or their packages define, and not only import.

    Args:
        modules: Their names.
        is_wanted: What is looked for.

    Returns:
        Members of the modules, by name.

    Raises:
        NotImported: A module cannot be imported.
    """
    importlib.invalidate_caches()  # a package may have been installed since
    packages, found = {name.partition(".")[0] for name in modules}, dict[str, Any]()
    for name in modules:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module's own code
            raise NotImported(name, ending(f"{type(error).__name__}: {error}")) from error
        found |= {
            member: value
            for member, value in vars(module).items()
            if is_wanted(value) and str(getattr(value, "__module__", "")).partition(".")[0] in packages
        }
    return found


def _is_part_of_models(value: Any) -> bool:
    kinds: tuple[Any, ...] = (
        keras.Operation,  # layers and models
        keras.Initializer,
        keras.regularizers.Regularizer,
        keras.constraints.Constraint,
        keras.dtype_policies.DTypePolicy,
    )
    return inspect.isclass(value) and issubclass(value, kinds)


def why_not_loaded(error: Exception, row: NetworkRow) -> str:
    """Why Keras does not load a model: the end of its message, without configurations.

    Args:
        error: From Keras.
        row: Of the registry.

    Returns:
        The reason, which ends a sentence.
    """
    text = str(error)
    if HUB.search(text):
        return extras.describe("keras-hub", "It was made with keras-hub, and", "hub", extras.WORKER).rstrip(
            "."
        )
    if match := NOT_FOUND.search(text):
        name = match[1]
        if row.imports:
            return (
                f"it has {name!r}, which is neither part of Keras nor defined in {', '.join(row.imports)}: "
                "add the module that defines it to imports in the network's table"
            )
        return (
            f"it has {name!r}, which is no part of Keras: install the package that defines it beside the "
            'worker, and name its module in the network\'s table, as in imports = ["my_package.layers"]'
        )
    return ending(without_configurations(text)) or type(error).__name__


def without_configurations(text: str) -> str:
    """Return a message of Keras with `{...}` in place of each long configuration."""
    parts, kept = [], 0
    for match in re.finditer("[{]", text):
        if match.start() < kept:
            continue
        end = _closing(text, match.start())
        if end - match.start() > MAX_CONFIGURATION:
            parts.append(text[kept : match.start()] + "{...}")
            kept = end
    return "".join(parts) + text[kept:]


def _closing(text: str, start: int) -> int:
    """The position after what closes the bracket at `start`, or `start`; those within quotes do not count."""
    depth, quote, position = 0, "", start
    while position < len(text):
        char = text[position]
        if quote:
            position += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    return start
