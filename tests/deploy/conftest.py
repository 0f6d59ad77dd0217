"""docker/ and deploy/ are held to what checks them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`
