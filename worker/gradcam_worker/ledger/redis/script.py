"""A Lua script as one typed call: a file, and a dataclass whose fields are the script's arguments.

A script is `lua/<file>.lua` beside the module that declares its class. It begins with the names of its
arguments, in the order of the fields:

    local prefix = ARGV[1]               what every key begins with; not a field: `RedisServer.run` adds it
    local worker = ARGV[2]               str, or an int that is stored or compared as text
    local lease_ms = tonumber(ARGV[3])   int, or None: nil
    local enter = ARGV[4] == '1'         bool
    local leases = records(5, 'job_id', 'attempt')     Sequence of a NamedTuple: the last field
    local routes = {unpack(ARGV, 5)}                   Sequence[str]: the last field

Fields of the type `Key` are in KEYS instead. No other line names KEYS or ARGV: a test holds each file to
that, and to its class. A line `-- include: clock` stands for `ledger/redis/lua/include/clock.lua`; what was
included before is not included again.
"""

import re
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, NewType, TypeVar, get_args, get_type_hints

INCLUDE = re.compile(r"^-- include: (\w+)\n", re.MULTILINE)
FRAGMENTS = Path(__file__).parent / "lua" / "include"

Result = TypeVar("Result")
Key = NewType("Key", str)


class LuaScript(Generic[Result]):
    """The base of all calls: a subclass is a dataclass, and its instance is one call with its arguments.

    `Result` is what the script returns, as redis-py hands it over.

    Example:
        @dataclass(frozen=True, kw_only=True)
        class TryLead(LuaScript[int], file="try_lead"):
            worker: str
            lease_ms: int
    """

    path: ClassVar[Path]

    def __init_subclass__(cls, *, file: str) -> None:
        """`file` is the name of the script, without its ending."""
        folder = Path(str(sys.modules[cls.__module__].__file__)).parent
        cls.path = folder / "lua" / f"{file}.lua"

    @classmethod
    def source(cls) -> str:
        """The script with all that it includes."""
        return load(cls.path)

    def keys(self) -> list[str]:
        """What the script finds in KEYS."""
        names = _keys_of(type(self))  # type: ignore[arg-type]  # mypy: a class has no hash
        values = [getattr(self, name) for name in names]
        return [key for value in values for key in ([value] if isinstance(value, str) else value)]

    def arguments(self) -> list[str | int]:
        """What the script finds in ARGV, where it has a prefix, behind that."""
        names = _keys_of(type(self))  # type: ignore[arg-type]  # as above
        encoded: list[str | int] = []
        for name, value in vars(self).items():  # in the order of the fields
            if name in names:
                continue
            if isinstance(value, str):
                encoded.append(value)
            elif isinstance(value, int) or value is None:
                encoded.append(_encode(value))
            else:
                for one in value:
                    encoded += [one] if isinstance(one, str) else map(_encode, one)
        return encoded


@cache
def load(path: Path) -> str:
    """Read a script.

    Args:
        path: The file.

    Returns:
        Its text, with that of each fragment in the place of the first line that includes it.

    Raises:
        FileNotFoundError: There is no such script, or no such fragment.
    """
    return _resolve(path, set())


def _resolve(path: Path, included: set[Path]) -> str:
    def fragment(match: re.Match[str]) -> str:
        wanted = FRAGMENTS / f"{match[1]}.lua"
        if wanted in included:
            return ""
        included.add(wanted)
        return _resolve(wanted, included)

    return INCLUDE.sub(fragment, path.read_text(encoding="utf-8"))


@cache
def _keys_of(script: type[Any]) -> list[str]:
    """The fields that are in KEYS."""
    hints = get_type_hints(script)
    return [one.name for one in fields(script) if Key in {hints[one.name], *get_args(hints[one.name])}]


def _encode(value: str | int | None) -> str | int:
    """No argument of a script is None or a bool in Redis: nothing at all is the empty string."""
    if value is None or value is False:
        return ""
    return "1" if value is True else value
