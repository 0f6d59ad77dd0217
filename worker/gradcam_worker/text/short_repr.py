"""The repr of a dataclass that holds arrays: their shapes in place of their numbers."""

from dataclasses import fields
from typing import Any


def short_repr(instance: Any) -> str:
    """A dataclass as text: an array by its dtype and shape, bytes by how many they are.

    Args:
        instance: an instance of a dataclass.

    Returns:
        Text like `Computed(layer='conv', scores=float32(1, 1000))`.
    """
    values = ((field.name, getattr(instance, field.name)) for field in fields(instance) if field.repr)
    return f"{type(instance).__name__}({', '.join(f'{name}={_short(value)}' for name, value in values)})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{tuple(value.shape)}"
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else repr(value)
