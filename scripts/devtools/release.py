"""Makes a release, except its upload: builds, inspects, installs, runs the demo.

    scripts/release               from a clean tree, whose CHANGELOG has a dated section of this version
    scripts/release --rehearse    from whatever there is
    scripts/release --only-build  without environments: no demo

dist/ holds a wheel, an sdist and their SHA256SUMS in the end. The same tree leaves the same bytes.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from devtools import ROOT
from gradcam_worker import __version__

NAME = "gradcam_worker"
# What the client's environment must not have, and what has to work there.
HEAVY = (
    *("celery", "kombu", "click", "rich", "numpy", "tensorflow"),
    *("keras", "cv2", "boto3", "PIL", "httpx", "pyarrow"),
)
CLIENT = ("client.client", "client.async_client", "schemas.job", "errors", "settings", "cli.main")
SDIST = (  # what a source distribution has at its top, at least
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "constraints.txt"),
    *("pyproject.toml", "zensical.toml", "deploy", "docker", "docs", "scripts", "tests", "worker"),
)
LICENSES = (
    "LICENSE",
    "worker/gradcam_worker/audit/data/NOTICE",
    "worker/gradcam_worker/gradcam/data/NOTICE",
)
EXTRAS = {"cpu", "gpu", "cli", "s3", "backfill", "sql", "demo"}


class NotReady(Exception):
    """Why there can be no release just now."""


class Built(NamedTuple):
    """What a build has left."""

    wheel: Path
    sdist: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, check, install, run; the exit code."""
    parser = argparse.ArgumentParser(description="Make a release, up to the upload.")
    parser.add_argument("--rehearse", action="store_true", help="from whatever there is")
    parser.add_argument("--only-build", action="store_true", help="without environments: no demo")
    options = parser.parse_args(arguments)
    try:
        if not options.rehearse:
            require_clean_tree()
            require_date(changes(__version__))
        built = build(ROOT, ROOT / "dist")
        inspect_archives(built)
        require_reproducible(built)
        if not options.only_build:
            with tempfile.TemporaryDirectory(prefix="gradcam-release-") as folder:
                check_client(built.wheel, Path(folder))
                check_worker(built.wheel, Path(folder))
        write_checksums(built)
    except (NotReady, subprocess.CalledProcessError) as error:
        print(f"No release: {error}", file=sys.stderr)
        return 1
    print(f"dist/ holds {__version__}. What is left: git tag v{__version__}, and the upload.")
    return 0


def require_clean_tree() -> None:
    """Raise NotReady unless everything is committed, and the version is new."""
    if changed := _output(["git", "status", "--porcelain"], ROOT):
        message = f"the tree is not clean:\n{changed}"
        raise NotReady(message)
    tag = f"v{__version__}"
    if _output(["git", "tag", "--list", tag], ROOT):
        message = f"there is a tag {tag} already: raise the version in worker/gradcam_worker/__init__.py"
        raise NotReady(message)


def changes(version: str) -> str:
    """The section of the changelog about a version, its title first. Raises NotReady."""
    text = (ROOT / "CHANGELOG.md").read_text()
    section = re.search(rf"^## {re.escape(version)}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not section or not section.group().partition("\n")[2].strip():
        message = f"CHANGELOG.md has nothing about {version}: it needs a section '## {version}, YYYY-MM-DD'"
        raise NotReady(message)
    return section.group()


def require_date(section: str) -> None:
    """Raise NotReady unless the section says when it is released."""
    title = section.partition("\n")[0]
    if not re.fullmatch(r"## \S+, 20\d\d-\d\d-\d\d", title):
        message = f"the title {title!r} of CHANGELOG.md should end in a date, as in ', 2031-05-06'"
        raise NotReady(message)


def build(source: Path, folder: Path, *, only: str = "") -> Built:
    """Build a source tree with its own build backend, or `only` its wheel. Nothing is downloaded."""
    for old in folder.glob(f"{NAME}-*"):
        old.unlink()
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *(["-t", only] if only else ())]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    return Built(folder / f"{NAME}-{__version__}-py3-none-any.whl", folder / f"{NAME}-{__version__}.tar.gz")


def inspect_archives(built: Built) -> None:
    """Raise NotReady with all that is missing in wheel or sdist, or should not be there."""
    if findings := wheel_findings(built.wheel) + sdist_findings(built.sdist):
        raise NotReady("; ".join(findings))


def wheel_findings(wheel: Path) -> list[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = f"{NAME}-{__version__}.dist-info"
        metadata = archive.read(f"{information}/METADATA").decode()
        entry = archive.read(f"{information}/entry_points.txt").decode()
    sources = (path for path in (ROOT / "worker" / NAME).rglob("*") if path.is_file())
    needed = {str(path.relative_to(ROOT / "worker")) for path in sources if path.suffix != ".pyc"}
    needed |= {f"{information}/licenses/{name}" for name in LICENSES}
    strange = {name for name in names if PurePosixPath(name).parts[0] not in {NAME, information}}
    extras = set(re.findall(r"^Provides-Extra: (\S+)", metadata, re.MULTILINE))
    findings = [f"the wheel lacks {name}" for name in sorted(needed - names)]
    findings += [f"the wheel should not hold {name}" for name in sorted(strange)]
    findings += [f"the wheel has no extra {extra}" for extra in sorted(EXTRAS - extras)]
    if f"\nVersion: {__version__}\n" not in metadata:
        findings.append(f"the wheel's version is not {__version__}")
    if "gradcam = gradcam_worker.cli.main:main" not in entry:
        findings.append("the wheel brings no command gradcam")
    return findings


def sdist_findings(sdist: Path) -> list[str]:
    """What is wrong with a source distribution."""
    with tarfile.open(sdist) as archive:
        top = {PurePosixPath(name).parts[1] for name in archive.getnames()}
    findings = [f"the sdist lacks {name}" for name in sorted({*SDIST} - top)]
    return findings + [f"the sdist should not hold {name}" for name in sorted(top - {*SDIST, ".gitignore"})]


def require_reproducible(built: Built) -> None:
    """Raise NotReady unless what is built from the sdist is what was built from the tree."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(built.sdist) as archive:
            archive.extractall(folder, filter="data")
        again = build(
            Path(folder) / built.sdist.name.removesuffix(".tar.gz"), Path(folder) / "dist", only="wheel"
        )
        if again.wheel.read_bytes() != built.wheel.read_bytes():
            message = "a wheel that is built from the sdist is another one"
            raise NotReady(message)


def check_client(wheel: Path, folder: Path) -> None:
    """Install the wheel alone; raise NotReady where it brings more than a client, or less."""
    python = environment(folder / "client", wheel)
    program = (
        f"import importlib.util; [importlib.import_module(f'{NAME}.{{name}}') for name in {CLIENT}]; "
        f"import {NAME}; print({NAME}.__version__, *filter(importlib.util.find_spec, {HEAVY}))"
    )
    version, *heavy = _output([str(python), "-P", "-c", program], folder).split()
    if heavy:
        message = f"the base install brings {' '.join(heavy)}"
        raise NotReady(message)
    if version != __version__:
        message = f"the installed version is {version}, not {__version__}"
        raise NotReady(message)


def check_worker(wheel: Path, folder: Path) -> None:
    """Install the wheel with what a worker needs, and run the demo, in a folder that holds nothing else."""
    python, empty = environment(folder / "worker", wheel, "cpu", "demo"), folder / "empty"
    empty.mkdir()
    subprocess.run([python.with_name("gradcam"), "demo"], cwd=empty, env=_outside(), check=True, timeout=600)
    if not (empty / "gradcam-demo" / "contact-sheet.jpg").exists():
        message = "the demo left no contact sheet"
        raise NotReady(message)


def write_checksums(built: Built) -> None:
    """Write SHA256SUMS, for `sha256sum -c`."""
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in built]
    (built.wheel.parent / "SHA256SUMS").write_text("".join(lines))


def environment(venv: Path, wheel: Path, *extras: str) -> Path:
    """A new environment with locked packages and the wheel; its Python."""
    setup = [sys.executable, str(ROOT / "scripts" / "setup"), "--venv", str(venv), "--packages-only", *extras]
    subprocess.run(setup, check=True)
    python = venv / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-index"]
    requirement = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    subprocess.run([*pip, requirement], check=True)  # without an index: all that it asks for has to be there
    return python


def _outside() -> dict[str, str]:
    """The environment without anything that leads to this tree."""
    inside = ("GRADCAM_", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(inside)}


def _output(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=_outside(), check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
