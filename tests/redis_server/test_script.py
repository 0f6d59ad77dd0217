"""Each Lua script and its typed call say the same."""

import importlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints
from zipfile import ZipFile

import pytest

import gradcam_worker
from gradcam_worker.backfill import registry
from gradcam_worker.broker import transport
from gradcam_worker.gateway.access import limits
from gradcam_worker.ledger.redis import outbox_scripts, scripts, transfer_scripts
from gradcam_worker.redis_server import script
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.redis_server.script import INCLUDE, Key, LuaScript, load
from gradcam_worker.settings import Settings

PACKAGE = Path(str(gradcam_worker.__file__)).parent
CALLS = [
    one
    for module in (limits, scripts, outbox_scripts, transfer_scripts, registry, transport)
    for one in vars(module).values()
    if isinstance(one, type) and issubclass(one, LuaScript) and one is not LuaScript
]
WITHOUT_PREFIX = {transport.Receive}  # Celery's keys are not ours
ARGUMENT = re.compile(r"local (\w+) = (tonumber\()?(KEYS|ARGV)\[(\d+)\](\)| == '1')?( --.*)?")
REST = re.compile(r"local (\w+) = (?:records\((\d+), ([^)]*)\)|\{unpack\((KEYS|ARGV), (\d+)\)\})( --.*)?")


@dataclass
class Declared:
    """An argument as its script declares it."""

    name: str
    where: str  # KEYS or ARGV
    at: int
    form: str  # text, number, flag, texts, or the names of the fields of records


def declared(path: Traversable) -> list[Declared]:
    """What a script says that its arguments are. It names KEYS and ARGV nowhere else."""
    found = []
    text = re.sub(r"\n +", " ", path.read_text())
    for line in text.splitlines():
        if match := ARGUMENT.fullmatch(line):
            form = "number" if match[2] else "flag" if match[5] else "text"
            assert bool(match[2]) == (match[5] == ")"), line
            found.append(Declared(match[1], match[3], int(match[4]), form))
        elif match := REST.fullmatch(line):
            form = " ".join(re.findall(r"'(\w+)'", match[3])) if match[2] else "texts"
            found.append(Declared(match[1], match[4] or "ARGV", int(match[2] or match[5]), form))
        else:
            assert not re.search("KEYS|ARGV", re.sub("--.*", "", line)), line
    return found


def fitting_forms(annotation: Any) -> set[str]:
    """How an argument of this type may be declared."""
    if get_origin(annotation) is Sequence:
        (one,) = get_args(annotation)
        return {" ".join(one._fields)} if hasattr(one, "_fields") else {"texts"}
    if annotation is bool:
        return {"flag"}
    if annotation is int:
        return {"number", "text"}  # text: it is compared or stored as such
    return {"number"} if annotation == int | None else {"text", "number"}  # a lease token is a time


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_arguments_of_a_script_are_the_fields_of_its_call(call: type[LuaScript[Any]]) -> None:
    names = [one.name for one in fields(call)]  # type: ignore[arg-type]  # a dataclass
    hints = get_type_hints(call)
    found = declared(call.path)
    ours = [one for one in found if one.name != "prefix"]
    assert [one.name for one in ours] == names
    assert (found != ours) == (call not in WITHOUT_PREFIX), "`prefix` is what RedisServer.run puts first"
    for where in ("KEYS", "ARGV"):
        numbers = [one.at for one in found if one.where == where]
        assert numbers == list(range(1, len(numbers) + 1))
    for one in ours:
        assert one.form in fitting_forms(hints[one.name]), one
        assert (one.where == "KEYS") == (Key in {hints[one.name], *get_args(hints[one.name])}), one


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_every_argument_of_a_script_is_used(call: type[LuaScript[Any]]) -> None:
    text = re.sub("--.*", "", call.source)
    for one in declared(call.path):
        assert len(re.findall(rf"\b{one.name}\b", text)) > 1, one
        for field in one.form.split() if " " in one.form else ():
            assert re.search(rf"\.{field}\b", text), field


def test_every_lua_file_is_a_call_or_included_and_no_lua_stands_in_python() -> None:
    files, fragments = {*PACKAGE.rglob("lua/*.lua")}, {*PACKAGE.rglob("lua/include/*.lua")}
    assert files | fragments == {*PACKAGE.rglob("*.lua")}
    assert {call.path for call in CALLS} == files
    included = {one for path in files | fragments for one in INCLUDE.findall(path.read_text())}
    assert sorted(included) == sorted(path.stem for path in fragments), "no name stands twice"
    assert not [path for path in PACKAGE.rglob("*.py") if re.search(r"redis\.p?call\(", path.read_text())]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_server_can_compile_a_script(call: type[LuaScript[Any]], settings: Settings) -> None:
    server = RedisServer(settings)
    try:
        assert server.redis.script_load(call.source)
    finally:
        server.close()


def test_a_fragment_is_included_once_in_the_place_of_the_first_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shared = tmp_path / "include", tmp_path / "shared"
    own.mkdir()
    shared.mkdir()
    monkeypatch.setattr(script, "SHARED_FRAGMENTS", shared)
    (shared / "inner.lua").write_text("local inner = '\\n'\n")
    (own / "outer.lua").write_text("-- include: inner\nlocal outer = inner\n")
    (tmp_path / "main.lua").write_text("-- include: outer\n-- include: inner\nreturn outer\n")
    assert load(tmp_path, tmp_path / "main.lua") == "local inner = '\\n'\nlocal outer = inner\nreturn outer\n"


def test_a_fragment_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "main.lua").write_text("-- include: nowhere\nreturn 1\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.lua"):
        load(tmp_path, tmp_path / "main.lua")


def test_the_scripts_are_found_in_a_package_that_is_imported_from_a_zip_file(tmp_path: Path) -> None:
    archive = tmp_path / "package.zip"
    with ZipFile(archive, "w") as packed:
        for path in PACKAGE.rglob("*"):
            if path.suffix in {".py", ".lua"}:
                packed.write(path, path.relative_to(PACKAGE.parent))
    modules = sorted(
        {call.__module__ for call in CALLS} - {transport.__name__}
    )  # Celery's own import is slow
    program = (
        "import sys, importlib\n"
        "archive, *modules = sys.argv[1:]\n"
        "sys.path.insert(0, archive)\n"
        "from gradcam_worker.redis_server.script import LuaScript\n"
        "for module in map(importlib.import_module, modules):\n"
        "    assert module.__file__.startswith(archive), module\n"
        "for call in LuaScript.__subclasses__():\n"
        "    print(call.__name__, len(call.source))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, archive, *modules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = {f"{call.__name__} {len(call.source)}" for call in CALLS if call.__module__ in modules}
    assert set(done.stdout.splitlines()) == expected


def test_a_script_is_the_one_that_was_there_when_its_call_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "upgraded/lua").mkdir(parents=True)
    (tmp_path / "upgraded/__init__.py").touch()
    (tmp_path / "upgraded/calls.py").write_text(
        "from gradcam_worker.redis_server.script import LuaScript\n"
        "class Upgraded(LuaScript, file='upgraded'): pass\n"
    )
    (tmp_path / "upgraded/lua/upgraded.lua").write_text("return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls = importlib.import_module("upgraded.calls")
    (tmp_path / "upgraded/lua/upgraded.lua").write_text("return 2\n")
    assert calls.Upgraded.source == "return 1\n"


class Pair(NamedTuple):
    name: str
    number: int


@dataclass(kw_only=True)
class Example(LuaScript[int], file="prune"):
    __module__ = scripts.__name__  # a script lies in a package

    key: Key
    keys_of_all: Sequence[Key]
    text: str
    number: int
    nothing: int | None
    yes: bool
    no: bool
    pairs: Sequence[Pair]


def test_a_call_encodes_its_fields_in_order() -> None:
    call = Example(
        key=Key("k"),
        keys_of_all=[Key("l"), Key("m")],
        text="t",
        number=3,
        nothing=None,
        yes=True,
        no=False,
        pairs=[Pair("a", 1), Pair("b", 2)],
    )
    assert call.path == PACKAGE / "ledger/redis/lua/prune.lua"
    assert call.keys() == ["k", "l", "m"]
    assert call.arguments() == ["t", 3, "", "1", "", "a", 1, "b", 2]
