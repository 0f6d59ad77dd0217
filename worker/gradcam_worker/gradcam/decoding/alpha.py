"""Flattening of translucent images on white, as a web page would show them."""

import cv2
import numpy as np
from PIL import Image

from gradcam_worker.gradcam.decoding.color import Conversion
from gradcam_worker.gradcam.decoding.structure import Pixels

STRIP_ROWS = 256  # flattened at a time: few, so that four channels of the whole image are never in memory


def flatten_on_white(translucent: Image.Image | Pixels, conversion: Conversion | None = None) -> Pixels:
    """Flatten a translucent image on white, after its colours are converted, as browsers do.

    Args:
        translucent: A Pillow image of any mode, which may not be decoded yet, or pixels (height, width, 4),
            uint8, BGRA.
        conversion: To sRGB; None: the colours are taken as they are.

    Returns:
        Pixels (height, width, 3), uint8, RGB.

    Raises:
        MemoryError: There is too little memory.
        Exception: Whatever a decoder of Pillow raises: Pillow decodes only here.
    """
    width, height = translucent.size if isinstance(translucent, Image.Image) else translucent.shape[1::-1]
    flattened = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, height)
        if isinstance(translucent, Image.Image):
            rows = _to_eight_bits(translucent.crop((0, top, width, bottom)))
        else:
            rows = Image.fromarray(cv2.cvtColor(translucent[top:bottom], cv2.COLOR_BGRA2RGBA))
        rows = rows if rows.mode == "RGBA" else rows.convert("RGBA")
        white = Image.new("RGB", rows.size, "white")
        white.paste(conversion.convert_rows(rows.convert("RGB")) if conversion else rows, mask=rows)
        flattened[top:bottom] = np.asarray(white)
    return flattened


def _to_eight_bits(rows: Image.Image) -> Image.Image:
    """Convert a 16-bit grey image with one transparent value: Pillow would compare only the low 8 bits."""
    transparent = rows.info.get("transparency")
    if rows.mode.startswith("I"):
        values = np.asarray(rows, np.uint32)
        alpha = np.where(values == transparent, 0, 255)
        grey_and_alpha = np.stack([values >> 8, alpha], axis=-1).astype(np.uint8)
        converted = Image.fromarray(grey_and_alpha)
        converted.info = {key: value for key, value in rows.info.items() if key != "transparency"}
        return converted
    return rows
