"""Some tests have a proxy that misbehaves between a store and its server."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`
