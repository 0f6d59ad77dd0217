"""What README, CONTRIBUTING and docs/ name exists: files, settings, commands, options, extras."""

import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from gradcam_worker.cli.commands import gradcam
from gradcam_worker.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
OUTSIDE = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "deploy/README.md", "docker/README.md"))]
PAGES = [*sorted(DOCS.rglob("*.md")), *OUTSIDE]

MAX_WORDS = 900  # of the README
FORMER = {"GRADCAM_WEBHOOK_ATTEMPTS"}  # what the notes on upgrading name
WORDS = (
    r"\b(desks?|doorbells?|couriers?|crew|fleet|lookout|strangers?|rubbish|tickets?|wish(es)?|who waits)\b"
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MAX_WORDS


@pytest.mark.parametrize("page", OUTSIDE, ids=name_of)
def test_links_of_a_page_outside_the_site_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]

    def named(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for one in (entry.values() if isinstance(entry, dict) else entry) for name in named(one)]

    there = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(named(project["nav"])) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_and_commands_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    settings = set(re.findall(r"GRADCAM_[A-Z0-9_]*[A-Z0-9]\b(?!_)", text)) - FORMER
    assert {name.removeprefix("GRADCAM_").lower() for name in settings} <= Settings.model_fields.keys()
    root: click.Command = gradcam
    for line in re.findall(r"(?:`|^)gradcam ([a-z][^`#\n|]*)", text, re.MULTILINE):
        words, command = line.split(), root
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not root, line
        group = (
            command.commands["run"]
            if isinstance(command, click.Group) and "run" in command.commands
            else command
        )
        options = {option for one in group.params for option in (*one.opts, *one.secondary_opts)}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    folders = "worker|tests|scripts|docs|deploy|docker"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or name == "docker/.env", name


def test_extras_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra
        for page in PAGES
        for extra in re.findall(
            r"(?:gradcam-worker|none-any\.whl|'\.)\[([a-z]\w*)\]", page.read_text(encoding="utf-8")
        )
    }
    assert {"cpu", "s3"} <= named <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_the_terms_of_the_field(page: Path) -> None:
    assert not re.search(WORDS, prose(page), re.IGNORECASE)
