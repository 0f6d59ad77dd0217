"""Overlays of heatmaps, and the encoding of images."""

import io
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

from gradcam_worker.gradcam.imaging.resize import (
    COLOR_RANK,
    Heatmap,
    Pixels,
    enlarge_inside,
    enlarge_placed,
    enlarge_unscaled,
)
from gradcam_worker.gradcam.sizing import Placement, spans

COLORMAPS = {
    "jet": cv2.COLORMAP_JET,
    "turbo": cv2.COLORMAP_TURBO,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "inferno": cv2.COLORMAP_INFERNO,
    "magma": cv2.COLORMAP_MAGMA,
    "plasma": cv2.COLORMAP_PLASMA,
    "cividis": cv2.COLORMAP_CIVIDIS,
    "grey": None,  # from black to white
}
MEDIA_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
ENCODER_OPTIONS = {
    "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 90],
    "png": [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE],
}
WEBP_OPTIONS = {"quality": 80, "method": 2}  # method 4, OpenCV's, takes twice the time for 8 % fewer bytes
MAX_SIDES = {"jpeg": 65_500, "png": 65_500, "webp": 16_383}  # longest side in pixels that can be encoded
STRIP_PIXELS = 65_536  # coloured at a time: with all intermediate arrays less than 1 MB


@lru_cache
def colors(colormap: str) -> Pixels:
    """The RGB colours of a colour map.

    Args:
        colormap: A name from `COLORMAPS`.

    Returns:
        (256, 1, 3), uint8.
    """
    ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
    code = COLORMAPS[colormap]
    if code is None:
        return np.asarray(cv2.cvtColor(ramp, cv2.COLOR_GRAY2RGB), np.uint8)
    return np.asarray(cv2.applyColorMap(ramp, code)[..., ::-1], np.uint8)


@lru_cache
def _weigh_colors(colormap: str, alpha: float) -> Pixels:
    """The RGB colours of a colour map, (256, 1, 3), multiplied by `alpha`."""
    return np.asarray(np.rint(alpha * colors(colormap)), np.uint8)


class OverlayBase:
    """An image over which many heatmaps are drawn. Not thread-safe.

    The image and the 256 colours are weighted once, so that each heatmap costs a look-up and a sum for each
    pixel. Both are rounded: a level differs by at most 1 from that of a blend that is rounded once.

    Where the network's input shows only a part of the image, the rest keeps its own colours.
    """

    def __init__(
        self,
        pixels: Pixels,
        *,
        alpha: float = 0.4,
        colormap: str = "jet",
        bgr: bool = False,
        placement: Placement | None = None,
    ) -> None:
        """Weigh the image and the colours.

        Args:
            pixels: (height, width, 3), uint8, RGB.
            alpha: The share of the colours, from 0 to 1.
            colormap: A name from `COLORMAPS`.
            bgr: Draw overlays in BGR, as encoders take them.
            placement: Where the heatmaps lie on the image; None: on all of it.
        """
        self._weighted_colors = _weigh_colors(colormap, alpha)
        self._placement = placement
        if bgr:
            pixels, self._weighted_colors = (
                cv2.cvtColor(array, cv2.COLOR_RGB2BGR) for array in (pixels, self._weighted_colors)
            )
        if placement:
            rows, columns = spans(placement, (pixels.shape[0], pixels.shape[1]))
            self._image, self._inside = pixels, (rows.slice, columns.slice)
            self._weighted_image = cv2.convertScaleAbs(pixels[self._inside], alpha=1 - alpha)
            return
        self._weighted_image = cv2.convertScaleAbs(pixels, pixels if bgr else None, alpha=1 - alpha)
        self._enlarged = np.empty(
            pixels.shape[:2], np.float32
        )  # allocated once: that costs more than the computation

    def draw(self, heatmap: Heatmap, *, out: Pixels | None = None) -> Pixels:
        """Draw a heatmap over the image. The values are enlarged first, then coloured.

        Args:
            heatmap: (rows, columns), float32, in [0, 1].
            out: The array to draw into, (height, width, 3), uint8; None: a new one.

        Returns:
            (height, width, 3), uint8.
        """
        height, width, _ = self._weighted_image.shape
        if self._placement:
            size = self._image.shape[0], self._image.shape[1]
            large, factor = enlarge_inside(heatmap, size, self._placement), np.float32(1)
            whole = np.empty_like(self._image) if out is None else out
            np.copyto(whole, self._image)
            drawn = whole[self._inside]
        else:
            large, factor = enlarge_unscaled(heatmap, (height, width), self._enlarged)
            whole = drawn = np.empty_like(self._weighted_image) if out is None else out
        # A few rows at a time, whose intermediate arrays stay in the processor's cache.
        step = max(STRIP_PIXELS // width, 1)
        for top in range(0, height, step):
            rows = slice(top, top + step)
            levels = cv2.convertScaleAbs(large[rows], alpha=255 * float(factor))
            cv2.add(cv2.applyColorMap(levels, self._weighted_colors), self._weighted_image[rows], drawn[rows])
        return whole


def overlay(
    pixels: Pixels,
    heatmap: Heatmap,
    *,
    alpha: float = 0.4,
    colormap: str = "jet",
    placement: Placement | None = None,
) -> Pixels:
    """Draw a heatmap over an image, at the size of the image.

    The values are enlarged first, then coloured, then blended.

    Args:
        pixels: (height, width, 3), uint8, RGB.
        heatmap: (rows, columns), float32, in [0, 1].
        alpha: The share of the colours, from 0 to 1.
        colormap: A name from `COLORMAPS`.
        placement: Where the heatmap lies on the image; None: on all of it.

    Returns:
        (height, width, 3), uint8, RGB.
    """
    return OverlayBase(pixels, alpha=alpha, colormap=colormap, placement=placement).draw(heatmap)


def to_grey(heatmap: Heatmap, size: tuple[int, int], placement: Placement | None = None) -> Pixels:
    """Draw a heatmap in grey.

    Args:
        heatmap: (rows, columns), float32, in [0, 1].
        size: (height, width).
        placement: Where the heatmap lies on the image; None: on all of it.

    Returns:
        (height, width), uint8; 255 stands for 1. 0 where the network's input does not show the image.
    """
    if placement:
        large, factor = enlarge_placed(heatmap, size, placement), np.float32(1)
    else:
        large, factor = enlarge_unscaled(heatmap, size)
    return np.asarray(cv2.convertScaleAbs(large, alpha=255 * float(factor)), np.uint8)


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode an image (height, width, 3), RGB, as a JPEG of a given quality, from 0 to 100."""
    bgr_pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr_pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def encode(pixels: Pixels, kind: str = "jpeg", *, bgr: bool = False) -> bytes:
    """Encode an image. The same pixels always give the same bytes.

    Args:
        pixels: (height, width, 3) RGB, or (height, width) grey; uint8.
        kind: `jpeg`, `png` or `webp`.
        bgr: The pixels are BGR, as encoders take them.

    Returns:
        The file.
    """
    if kind == "webp":
        file = io.BytesIO()
        Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if bgr else pixels).save(
            file, kind, **WEBP_OPTIONS
        )
        return file.getvalue()
    bgr_pixels = pixels if bgr or pixels.ndim < COLOR_RANK else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(f".{EXTENSIONS[kind]}", bgr_pixels, ENCODER_OPTIONS[kind])
    return data.tobytes()
