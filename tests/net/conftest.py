"""The addresses that must not be dialled are those of the attack on them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`
