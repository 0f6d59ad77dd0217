"""A Lua script as a typed call: a dataclass whose fields are the script's arguments.

A script is the file `lua/<file>.lua` beside the module that declares its class. It begins by naming its
arguments, in the order of the fields:

    local prefix = ARGV[1]               the prefix of all keys; not a field: `RedisServer.run` adds it
    local worker = ARGV[2]               str, or an int that is stored or compared as text
    local lease_ms = tonumber(ARGV[3])   int, or None: nil
    local enter = ARGV[4] == '1'         bool
    local leases = records(5, 'job_id', 'attempt')     Sequence of a NamedTuple: the last field
    local routes = {unpack(ARGV, 5)}                   Sequence[str]: the last field

Fields of the type `Key` are in KEYS instead. No other line may name KEYS or ARGV: a test compares each file
with its class. A line `-- include: clock` is replaced by the file `include/clock.lua` beside the script, or
where there is none by `redis_server/lua/include/clock.lua`; each file is included only once.
"""

import re
from dataclasses import fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, ClassVar, Generic, NewType, TypeVar, get_args, get_type_hints

INCLUDE = re.compile(r"^-- include: (\w+)\n", re.MULTILINE)
SHARED_FRAGMENTS = resources.files(__package__) / "lua" / "include"

Result = TypeVar("Result")
Key = NewType("Key", str)


class LuaScript(Generic[Result]):
    """The base class of all calls. A subclass is a dataclass; an instance is one call with its arguments.

    `Result` is the type of the script's reply as redis-py decodes it. Subclasses are not frozen: creating a
    frozen instance takes several times as long, and calls are created for every step of a job.

    Examples:
        @dataclass(kw_only=True)
        class TryLead(LuaScript[int], file="try_lead"):
            worker: str
            lease_ms: int
    """

    folder: ClassVar[Traversable]  # a Path, unless the package is imported from a zip file
    path: ClassVar[Traversable]

    source: ClassVar[str]  # the text of the script, with everything that it includes

    def __init_subclass__(cls, *, file: str) -> None:
        """Read the script now: later its file may be that of another version, which is being installed.

        Args:
            file: The name of the script's file, without its extension.
        """
        cls.folder = resources.files(cls.__module__.rpartition(".")[0]) / "lua"
        cls.path = cls.folder / f"{file}.lua"
        cls.source = load(cls.folder, cls.path)

    def keys(self) -> list[str]:
        """The script's KEYS."""
        values = [getattr(self, name) for name in _key_fields(type(self))]  # type: ignore[arg-type]  # hashable
        return [key for value in values for key in ([value] if isinstance(value, str) else value)]

    def arguments(self) -> list[str | int]:
        """The script's ARGV, without the prefix."""
        values = vars(self)  # in the order of the fields
        if keys := _key_fields(type(self)):  # type: ignore[arg-type]  # as above
            values = {name: value for name, value in values.items() if name not in keys}
        encoded: list[str | int] = []
        for value in values.values():
            kind = type(value)
            if kind is str or kind is int:  # neither None nor bool: most are
                encoded.append(value)
            elif isinstance(value, str | int) or value is None:
                encoded.append(_encode(value))
            else:
                for item in value:
                    encoded += [item] if isinstance(item, str) else map(_encode, item)
        return encoded


def load(folder: Traversable, path: Traversable) -> str:
    """Read a script.

    Args:
        folder: The folder whose `include` has the fragments of this package.
        path: The file.

    Returns:
        Its text. The first line that includes a fragment is replaced by the fragment's text.

    Raises:
        FileNotFoundError: The script or a fragment does not exist.
    """
    included = set[str]()

    def resolve(path: Traversable) -> str:
        return INCLUDE.sub(fragment, path.read_text(encoding="utf-8"))

    def fragment(match: re.Match[str]) -> str:
        if match[1] in included:
            return ""
        included.add(match[1])
        file = f"{match[1]}.lua"
        own = folder / "include" / file
        return resolve(own if own.is_file() else SHARED_FRAGMENTS / file)

    return resolve(path)


@cache
def _key_fields(script: type[Any]) -> list[str]:
    """The names of the fields that are passed in KEYS."""
    types = get_type_hints(script)
    return [
        field.name for field in fields(script) if Key in {types[field.name], *get_args(types[field.name])}
    ]


def _encode(value: str | int | None) -> str | int:
    """Encode a value as an argument: redis-py accepts neither None nor bool."""
    if value is None or value is False:
        return ""
    return "1" if value is True else value
