"""Tests of audits share `devtools.synthetic_dataset` with the bench."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`
