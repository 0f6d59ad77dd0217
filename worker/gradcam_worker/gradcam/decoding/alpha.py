"""Translucent pictures, laid on white, as a page would show them."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

ROWS = 256  # laid on white at a time: few, so that four channels of the whole are never made


def on_white(stored: Image.Image | Pixels) -> Pixels:
    """A picture of any mode, or (height, width, 4) BGRA -> (height, width, 3) RGB on white.

    Raises whatever Pillow's decoders raise, for they work no sooner than here, and MemoryError.
    """
    width, height = stored.size if isinstance(stored, Image.Image) else stored.shape[1::-1]
    laid = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, ROWS):
        bottom = min(top + ROWS, height)
        if isinstance(stored, Image.Image):
            rows = _eight_bits(stored.crop((0, top, width, bottom)))
        else:
            rows = Image.fromarray(cv2.cvtColor(stored[top:bottom], cv2.COLOR_BGRA2RGBA))
        rows = rows if rows.mode == "RGBA" else rows.convert("RGBA")
        white = Image.new("RGB", rows.size, "white")
        white.paste(rows, mask=rows)
        laid[top:bottom] = np.asarray(white)
    return laid


def _eight_bits(rows: Image.Image) -> Image.Image:
    """A grey picture with one transparent value of 16 bits: Pillow would compare only the low 8."""
    transparent = rows.info.get("transparency")
    if rows.mode.startswith("I"):
        values = np.asarray(rows, np.uint32)
        alpha = np.where(values == transparent, 0, 255)
        pair = np.stack([values >> 8, alpha], axis=-1).astype(np.uint8)
        eight = Image.fromarray(pair)
        eight.info = {key: value for key, value in rows.info.items() if key != "transparency"}
        return eight
    return rows
