"""A template and its data -> one HTML page that needs nothing else, and that no text of a job can change.

The data travel in one JSON block, in which no character means anything to HTML, and reach the page as text.
The page's policy names its own style and script by their hashes, so that nothing else would run.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from gradcam_worker.gradcam.classes import DATA


def filled(template: str, data: Mapping[str, Any]) -> bytes:
    """The page in UTF-8. JSON leaves nothing but ASCII, and three characters of it mean something."""
    before, after = _around(template)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f"{before}{text}{after}".encode()


def in_base64(data: bytes) -> str:
    """Bytes as the page's script takes them."""
    return base64.b64encode(data).decode()


@lru_cache
def _around(template: str) -> tuple[str, str]:
    """A template before and after its data; where it asks for them, with the functions that draw heatmaps."""
    text = (DATA / template).read_text(encoding="utf-8")
    text = text.replace("@HEATMAP@\n", (DATA / "heatmap.js").read_text(encoding="utf-8"))
    for tag, place in (("style", "@STYLE@"), ("script", "@SCRIPT@")):
        block = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = hashlib.sha256(block[1].encode() if block else b"").digest()
        text = text.replace(place, f"'sha256-{in_base64(digest)}'", 1)
    before, _, after = text.partition("@DATA@")
    return before, after
