"""Tools for developers of gradcam-worker; none of it is in the wheel.

    bench           how fast, and how much memory: `scripts/bench`
    faults          attacks on the guarantees: `scripts/faults`
    deploy_checks   docker/ and deploy/ without Docker and without a cluster: `scripts/check-deploy`
    planted         small networks with a shortcut planted into their training
    agreement       our numbers against the same computed in other ways: `scripts/agreement`
    docs            generated pages and schemas, pictures, the site: `scripts/docs`, `scripts/pictures`
    release         wheel and sdist: `scripts/release`

The docstring of each package says where to begin. The programs are run as modules (`python -m
devtools.bench`), with the folder `scripts` on the import path; so are those that they start themselves.
"""

import os
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent  # of the repository


def command(module: str, *arguments: str) -> list[str]:
    """How a module of this package, such as `faults.images`, is run here, given `import_path`."""
    return [sys.executable, "-P", "-m", f"{__name__}.{module}", *arguments]


def import_path() -> dict[str, str]:
    """What has to be in the environment of a process that imports this package."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{SCRIPTS}{os.pathsep}{before}" if before else str(SCRIPTS)}
