"""Checks docker/ and deploy/ as far as possible without Docker and without a cluster.

    scripts/check-deploy               # what is wrong, a line each; exit code 1 where anything is
    scripts/check-deploy --rehearse    # and: the image is made and run, see `rehearsal`; some minutes

Others' programs come first (hadolint, shellcheck, yamllint, schemas); then whatever is named there (settings,
commands, paths, ports, users, targets) is looked up in the code; `helm` checks the chart; `started` starts
what the chart starts.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from devtools import ROOT
from devtools.deploy_checks import compose, helm, rehearsal, started, tools
from devtools.deploy_checks.dockerfile import DOCKERFILE
from gradcam_worker.cli.commands import gradcam
from gradcam_worker.settings import PREFIX, Settings

COMPOSE = ROOT / "docker" / "compose.yaml"
HERE = Path(__file__).parent
PROMETHEUS = ROOT / "docker" / "prometheus.yml"
TEXTS = {".yaml", ".yml", ".md", ".json", ".example", ".tpl", ".txt", ""}


def programs() -> list[str]:
    """Return what others' programs find."""
    return [
        *tools.findings("hadolint", DOCKERFILE),
        *tools.findings("shellcheck", *shell_scripts()),
        *tools.findings("yamllint", "--strict", "-c", HERE / "yamllint.yaml", *yaml_files()),
        *tools.findings("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE),
        *by_schema("compose", COMPOSE),
        *by_schema("prometheus", PROMETHEUS),
    ]


def by_schema(name: str, *files: Path) -> list[str]:
    """Return what a schema of ours does not allow."""
    return tools.findings("check-jsonschema", "--schemafile", HERE / f"{name}.schema.json", *files)


def shell_scripts() -> list[Path]:
    """Return every shell script of scripts/, docker/, deploy/ and .ci/: its first line tells."""
    plain = (path for path in files("scripts", "docker", "deploy", ".ci") if path.suffix in {"", ".sh"})
    return [path for path in plain if re.match(rb"#!.*\b(ba|da)?sh\b", path.read_bytes()[:64])]


def files(*folders: str) -> list[Path]:
    """Return every file of these folders."""
    return sorted(path for name in folders for path in (ROOT / name).rglob("*") if path.is_file())


def yaml_files() -> list[Path]:
    """Return every YAML file of docker/ and deploy/, except templates."""
    every = (path for path in files("docker", "deploy") if path.suffix in {".yaml", ".yml"})
    return [path for path in every if path.parent.name != "templates"]


def names() -> Iterator[str]:
    """What docker/ and deploy/ name, and the code does not have."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for file in files("docker", "deploy"):
        if file.suffix not in TEXTS or file.name == ".env":
            continue
        text, place = file.read_text(), file.relative_to(ROOT)
        for name in sorted(set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]\b(?!_)", text)) - known):
            yield f"{place}: there is no setting {name}"
        for command in sorted(set(re.findall(r"`gradcam ([a-z]+)\b", text))):
            if command not in gradcam.commands:
                yield f"{place}: there is no command `gradcam {command}`"


def prometheus() -> Iterator[str]:
    """Whether Prometheus asks where the images answer, by a name that they have, and finds its rules."""
    port = int(compose.image_environment("cpu")[f"{PREFIX}METRICS_PORT"])
    services = compose.loaded(COMPOSE.read_text(), compose.variables())["services"]
    joined = [service["networks"] for service in services.values() if isinstance(service["networks"], dict)]
    networks = [network or {} for by_name in joined for network in by_name.values()]
    aliases = {alias for network in networks for alias in network.get("aliases", [])}
    config = yaml.safe_load(PROMETHEUS.read_text())
    for scrape in config["scrape_configs"]:
        for discovery in scrape["dns_sd_configs"]:
            if discovery["port"] != port:
                yield f"prometheus.yml asks at port {discovery['port']}, the images answer at {port}"
            if unknown := set(discovery["names"]) - aliases:
                yield f"prometheus.yml asks {', '.join(unknown)}: no network alias of compose.yaml"
    mounted = [volume.split(":")[:2] for volume in services["prometheus"]["volumes"]]
    for rules in map(Path, config["rule_files"]):
        folders = [COMPOSE.parent / here for here, there in mounted if there == str(rules.parent)]
        if not [file for folder in folders for file in folder.glob(rules.name)]:
            yield f"prometheus.yml reads {rules}, where nothing is mounted"


def findings() -> list[str]:
    """Return everything that is wrong, without what has to be started. Raises tools.Missing."""
    tools.make()
    return [
        *programs(),
        *compose.image_findings(DOCKERFILE.read_text()),
        *compose.findings(COMPOSE.read_text()),
        *prometheus(),
        *names(),
        *helm.chart_findings(),
    ]


def main() -> int:
    """Check everything; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="make the image and run it, too")
    options = parser.parse_args()
    begun = time.monotonic()
    try:
        wrong = [*findings(), *started.findings()]
    except tools.Missing as error:
        wrong = [str(error)]
    print(f"Checked in {time.monotonic() - begun:.0f} s.")
    if options.rehearse:
        wrong += rehearsal.main()
    print("\n".join(wrong) or "docker/ and deploy/ are well.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
