import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


def test_the_published_schemas_are_those_of_the_models() -> None:
    command = [sys.executable, "-P", "-m", "devtools.docs.reference_pages", "--check"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
