"""Network inputs, overlays of heatmaps, and the encoding of images."""

import io
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Heatmap = NDArray[np.float32]

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
ENCODER_OPTIONS = {  # chosen with `scripts/bench host`, which measures alternatives
    "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 90],
    "png": [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE],
}
WEBP_OPTIONS = {"quality": 80, "method": 2}  # method 4, OpenCV's, takes twice the time for 8 % fewer bytes
MAX_SIDES = {"jpeg": 65_500, "png": 65_500, "webp": 16_383}  # longest side in pixels that can be encoded
COLOR_RANK = 3  # (height, width, channels)
MAX_OPENCV_CHANNELS = 4  # that OpenCV can shrink by area
HALVING_MARGIN = 4  # an image is halved while half of it is at least 4 times the target size
STRIP_PIXELS = 65_536  # coloured at a time: with all intermediate arrays less than 1 MB


def fit(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize an image to the input size of a network, without keeping its proportions.

    It is shrunk by area interpolation, without aliasing, or enlarged bilinearly. A much larger image is
    halved first, which is at least twice as fast; its levels then differ by a few of 255 from the exact means
    of the areas.

    Args:
        pixels: (height, width, channels), uint8.
        size: (height, width) in pixels.

    Returns:
        A new array (*size, channels), uint8.
    """
    height, width, channels = pixels.shape
    can_halve = channels <= MAX_OPENCV_CHANNELS
    while (
        can_halve
        and min(height // size[0], width // size[1]) >= 2 * HALVING_MARGIN
        and height % 2 == width % 2 == 0
    ):
        height, width = height // 2, width // 2
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        pixels = pixels.reshape(height, width, channels)
    return np.array(_resize(pixels, size), np.uint8)


def enlarge(heatmap: Heatmap, size: tuple[int, int]) -> Heatmap:
    """Enlarge a heatmap bilinearly, with half-pixel centres; its peak keeps its value.

    Args:
        heatmap: (rows, columns), float32.
        size: (height, width).

    Returns:
        (height, width), float32.
    """
    large, factor = _enlarge_unscaled(heatmap, size)
    return np.asarray(large * factor, np.float32)


def _enlarge_unscaled(
    heatmap: Heatmap, size: tuple[int, int], out: Heatmap | None = None
) -> tuple[Heatmap, np.float32]:
    """Enlarge a heatmap. Returns it with the factor that restores the value of its peak."""
    large = np.asarray(_resize(heatmap, size, out), np.float32)
    peak = large.max()
    return large, heatmap.max() / peak if peak > 0 else np.float32(1)


def _resize(image: Any, size: tuple[int, int], out: Any = None) -> Any:
    """Shrink each side by area, or enlarge it bilinearly; into the array `out`, if it is given."""
    height, width = size
    if image.ndim == COLOR_RANK and image.shape[2] > MAX_OPENCV_CHANNELS:
        groups = [
            image[..., first : first + MAX_OPENCV_CHANNELS]
            for first in range(0, image.shape[2], MAX_OPENCV_CHANNELS)
        ]
        return np.concatenate([_resize(group, size) for group in groups], axis=2)
    shrunk_size = min(height, image.shape[0]), min(width, image.shape[1])
    resized = image
    for (rows, columns), interpolation, target in (
        (shrunk_size, cv2.INTER_AREA, None),
        (size, cv2.INTER_LINEAR, out),
    ):
        if resized.shape[:2] != (rows, columns):
            resized = cv2.resize(resized, (columns, rows), target, interpolation=interpolation)
    return resized.reshape(height, width, *image.shape[2:])  # OpenCV drops the axis of a single channel


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
    """

    def __init__(
        self, pixels: Pixels, *, alpha: float = 0.4, colormap: str = "jet", bgr: bool = False
    ) -> None:
        """Weigh the image and the colours.

        Args:
            pixels: (height, width, 3), uint8, RGB.
            alpha: The share of the colours, from 0 to 1.
            colormap: A name from `COLORMAPS`.
            bgr: Draw overlays in BGR, as encoders take them.
        """
        self._weighted_colors = _weigh_colors(colormap, alpha)
        if bgr:
            pixels, self._weighted_colors = (
                cv2.cvtColor(array, cv2.COLOR_RGB2BGR) for array in (pixels, self._weighted_colors)
            )
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
        large, factor = _enlarge_unscaled(heatmap, (height, width), self._enlarged)
        drawn = np.empty_like(self._weighted_image) if out is None else out
        # A few rows at a time, whose intermediate arrays stay in the processor's cache.
        step = max(STRIP_PIXELS // width, 1)
        for top in range(0, height, step):
            rows = slice(top, top + step)
            levels = cv2.convertScaleAbs(large[rows], alpha=255 * float(factor))
            cv2.add(cv2.applyColorMap(levels, self._weighted_colors), self._weighted_image[rows], drawn[rows])
        return drawn


def overlay(pixels: Pixels, heatmap: Heatmap, *, alpha: float = 0.4, colormap: str = "jet") -> Pixels:
    """Draw a heatmap over an image, at the size of the image.

    The values are enlarged first, then coloured, then blended.

    Args:
        pixels: (height, width, 3), uint8, RGB.
        heatmap: (rows, columns), float32, in [0, 1].
        alpha: The share of the colours, from 0 to 1.
        colormap: A name from `COLORMAPS`.

    Returns:
        (height, width, 3), uint8, RGB.
    """
    return OverlayBase(pixels, alpha=alpha, colormap=colormap).draw(heatmap)


def to_grey(heatmap: Heatmap, size: tuple[int, int]) -> Pixels:
    """Draw a heatmap in grey.

    Args:
        heatmap: (rows, columns), float32, in [0, 1].
        size: (height, width).

    Returns:
        (height, width), uint8; 255 stands for 1.
    """
    large, factor = _enlarge_unscaled(heatmap, size)
    return np.asarray(cv2.convertScaleAbs(large, alpha=255 * float(factor)), np.uint8)


def shrink_to_edge(pixels: Pixels, max_edge: int | None) -> Pixels:
    """Shrink an image in proportion, so that its longer side has at most `max_edge` pixels.

    Args:
        pixels: (height, width, 3), uint8.
        max_edge: In pixels; None: any.

    Returns:
        The image itself, if it is small enough, or a smaller one.
    """
    height, width, _ = pixels.shape
    scale = min((max_edge or max(height, width)) / max(height, width), 1)
    if scale == 1:
        return pixels
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


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
