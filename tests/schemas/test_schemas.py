import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_published_schemas_are_those_of_the_models() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "programs" / "schemas.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
