"""One test reads the generated page of the error codes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`
