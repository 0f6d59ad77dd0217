"""Self-contained HTML pages, made of a template and data. No text in the data can inject HTML.

The data are one JSON block, in which all characters that mean something in HTML are escaped; the page inserts
them as text. Its content security policy allows only its own style and script, by their hashes.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.sizing import Placement

ENCODED_ONE = 65_535  # how 1 is encoded in a heatmap


def fill_template(
    template: str, data: Mapping[str, Any], *, folder: Path = DATA, connect: tuple[str, ...] = ()
) -> bytes:
    """Fill a template with data.

    Args:
        template: The name of a file in `folder`.
        data: What the page's script reads, as JSON.
        folder: Where the template is; what it includes is there, or in `data/`.
        connect: The sources that the script may ask for data, for a template with `@CONNECT@`.

    Returns:
        The page, in UTF-8.
    """
    # JSON is ASCII already; these three characters mean something in HTML.
    before, after = _split_template(template, folder)
    before = before.replace("@CONNECT@", " ".join(connect) or "'none'", 1)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"{before}{text}{after}".encode()


def encode_heatmaps(heatmaps: NDArray[np.float32]) -> str:
    """Encode heatmaps for the script of a page, rounded to 1/65535.

    Args:
        heatmaps: Any shape, in [0, 1].

    Returns:
        Little-endian uint16 in base64, which is shorter than digits.
    """
    return to_base64(np.rint(heatmaps * ENCODED_ONE).astype("<u2").tobytes())


def page_placement(placement: Placement | None) -> dict[str, list[float]]:
    """Where heatmaps lie on a photo, for the script of a page; nothing if they lie on all of it."""
    if placement is None:
        return {}
    sides = placement.left, placement.top, placement.right, placement.bottom
    return {"placement": [round(side, 6) for side in sides]}


def to_base64(data: bytes) -> str:
    """Encode bytes for the script of a page."""
    return base64.b64encode(data).decode()


@lru_cache
def _split_template(template: str, folder: Path) -> tuple[str, str]:
    """The parts of a template before and after its data. A line `@name@` includes that file."""

    def included(line: re.Match[str]) -> str:
        own = folder / line[1]
        return (own if own.exists() else DATA / line[1]).read_text("utf-8")

    text = (folder / template).read_text(encoding="utf-8")
    text = re.sub(r"^@([a-z_-]+\.\w+)@\n", included, text, flags=re.MULTILINE)
    for tag, placeholder in (("style", "@STYLE@"), ("script", "@SCRIPT@")):
        block = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = hashlib.sha256(block[1].encode() if block else b"").digest()
        text = text.replace(placeholder, f"'sha256-{to_base64(digest)}'", 1)
    before, _, after = text.partition("@DATA@")
    return before, after
