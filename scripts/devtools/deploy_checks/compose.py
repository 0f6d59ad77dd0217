"""docker/compose.yaml, checked for what no schema says: whatever it names exists."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import yaml  # type: ignore[import-untyped]
from dotenv import dotenv_values

from devtools import ROOT
from devtools.deploy_checks.dockerfile import DOCKERFILE, stages
from gradcam_worker import __version__
from gradcam_worker.cli.commands import gradcam
from gradcam_worker.errors import InvalidSettings
from gradcam_worker.runtime.processes.supervisor import REQUEUE_TIMEOUT_S
from gradcam_worker.settings import Settings

FOLDER = ROOT / "docker"
OURS = "gradcam-worker"
USERS = ROOT / "deploy" / "redis" / "users.acl"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?::-(?P<default>[^}]*))|(?::\?[^}]*))?\}")


def variables(file: Path = FOLDER / ".env.example") -> dict[str, str]:
    """What docker/.env says."""
    return {name: value or "" for name, value in dotenv_values(file).items()}


def loaded(text: str, known: Mapping[str, str]) -> dict[str, Any]:
    """A compose file with its variables filled in. Raises KeyError where one has no value."""

    def fill(variable: re.Match[str]) -> str:
        return known.get(variable["name"]) or variable["default"] or known[variable["name"]]

    return dict(yaml.safe_load(_VARIABLE.sub(fill, text).replace("$$", "$")))


def findings(text: str) -> Iterator[str]:
    """What is wrong with a compose file."""
    known = variables()
    named = {variable["name"] for variable in _VARIABLE.finditer(text)}
    if known["VERSION"] != __version__:
        yield f"docker/.env.example: VERSION is {known['VERSION']}, the code's is {__version__}"
    if named != set(known):
        others = ", ".join(sorted(named ^ set(known)))
        yield f"docker/.env.example and compose.yaml do not name the same: {others}"
        return
    whole = loaded(text, known)
    for name, service in whole["services"].items():
        of_ours = _ours(service) if OURS in service["image"] else ()
        for finding in (*_there(service), *of_ours, *_wired(service, whole)):
            yield f"compose.yaml: {name}: {finding}"


def _there(service: Mapping[str, Any]) -> Iterator[str]:
    """Files that are mounted, the Dockerfile and its target."""
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith(".") and not (FOLDER / source).exists():
            yield f"{source} is mounted and not there"
    if build := service.get("build"):
        target = build["target"]
        if target not in stages(DOCKERFILE.read_text()):
            yield f"the Dockerfile has no target {target}"
        if service["image"] != f"{OURS}:{__version__}-{target}":
            yield f"image {service['image']} must be {OURS}:{__version__}-{target}, which is what is built"


def _ours(service: Mapping[str, Any]) -> Iterator[str]:
    """Settings and the command of one of our images."""
    environment = image_environment(service["image"].rpartition("-")[2])
    environment |= {name: str(value) for name, value in service.get("environment", {}).items()}
    try:
        settings = Settings.from_environment(environment)
    except InvalidSettings as error:
        yield str(error)
        return
    user = urlsplit(settings.broker_url).username
    if f"user {user} " not in USERS.read_text() + (FOLDER / "valkey").read_text():
        yield f"there is no user {user} in deploy/redis/users.acl or docker/valkey"
    if service["image"].endswith("-web"):
        return
    is_client = service["image"].endswith("-client")
    command = service.get("command", ["serve"] if is_client else ["worker"])
    yield from command_findings(command)
    grace = float(service.get("stop_grace_period", "10s").removesuffix("s"))
    if command == ["worker"] and grace < settings.shutdown_timeout_s + REQUEUE_TIMEOUT_S:
        yield f"a worker that needs {settings.shutdown_timeout_s:g} s to end is killed after {grace:g} s"
    places = [mount.split(":")[0] for mount in service.get("tmpfs", [])]
    places += [volume.split(":")[1] for volume in service.get("volumes", [])]
    if command[0] in {"worker", "deliver", "serve"} and not {"/cache", "/tmp"} <= {*places}:  # noqa: S108  # in a container
        yield f"it writes to /cache and /tmp, and has {places}"


def _wired(service: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[str]:
    """Hosts of its settings are services that share a network with it; what it waits for exists."""
    services = whole["services"]
    for name in service.get("depends_on", {}):
        if name not in services:
            yield f"it waits for {name}, which does not exist"
    for key, value in service.get("environment", {}).items():
        url = urlsplit(str(value))
        host = url.hostname if url.scheme in {"http", "redis"} else None
        if host in {None, "127.0.0.1"}:
            continue
        if host not in services or not set(services[host]["networks"]) & set(service["networks"]):
            yield f"{key} names {host}, which is no service that it can reach"
    for network in service["networks"]:
        if network not in whole["networks"]:
            yield f"there is no network {network}"


def image_environment(target: str) -> dict[str, str]:
    """The settings that an image brings along."""
    by_name = stages(DOCKERFILE.read_text())
    stage = by_name[target]
    pairs = (pair for text in stage.texts("ENV") for pair in text.split() if pair.startswith("GRADCAM_"))
    inherited = image_environment(stage.parent) if stage.parent in by_name else {}
    return inherited | dict(pair.split("=", 1) for pair in pairs)


def command_findings(words: list[str]) -> Iterator[str]:
    """What `gradcam` would say against a command line, without running it."""
    name, *rest = words
    if name not in gradcam.commands:
        yield f"there is no command gradcam {name}"
        return
    try:
        gradcam.commands[name].make_context(name, rest)
    except click.ClickException as error:
        yield f"gradcam {' '.join(words)}: {error.format_message()}"


def image_findings(text: str) -> Iterator[str]:
    """What is wrong with the Dockerfile beside what hadolint says."""
    by_name = stages(text)
    runtime = by_name["runtime"]
    if f"VERSION={__version__}" not in runtime.texts("ARG"):
        yield f"Dockerfile: ARG VERSION must say what worker/gradcam_worker/__init__.py does, {__version__}"
    uid = re.findall(r"useradd .*--uid ([0-9]+)", text)
    for target in ("cpu", "gpu", "client", "web"):
        users = by_name[target].texts("USER")
        if users != [f"{number}:0" for number in uid]:
            yield f"Dockerfile: target {target} runs as {users}, the account is {uid}"
        try:
            port = Settings.from_environment(image_environment(target)).metrics_port
        except InvalidSettings as error:
            yield f"Dockerfile: target {target}: {error}"
            continue
        if runtime.texts("EXPOSE") != [str(port)]:
            yield f"Dockerfile: EXPOSE says {runtime.texts('EXPOSE')}, GRADCAM_METRICS_PORT {port}"
    for command in (*runtime.texts("CMD"), *by_name["client"].texts("CMD")):
        yield from (f"Dockerfile: {finding}" for finding in command_findings(yaml.safe_load(command)))
