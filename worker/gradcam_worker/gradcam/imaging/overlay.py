"""Pixels -> network input; heatmap -> overlay; a picture -> bytes."""

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
ENCODING = {  # chosen by `scripts/bench host`, which prints what others would take
    "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 90],
    "png": [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE],
}
WEBP = {"quality": 80, "method": 2}  # OpenCV's is 4: for a twelfth less it takes more than twice the time
LONGEST = {"jpeg": 65_500, "png": 65_500, "webp": 16_383}  # pixels of a side that can be encoded
COLOR_RANK = 3  # (height, width, channels)
MAX_CHANNELS = 4  # that OpenCV shrinks by area at once
ENOUGH = 4  # times the size asked for, on both sides: a picture is halved while its half is that large
STRIP = 65_536  # pixels that are coloured at once: with all that they are made of, under a megabyte


def fit(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Squash a picture (height, width, 3) to a network's input `size` (height, width).

    Shrinks with area interpolation (no aliasing), enlarges bilinearly. A picture that is larger than
    `ENOUGH` times the size when it is halved is halved first, which is twice as fast or more, and a few
    levels of 255 from the exact mean of each area at most; any other has the exact means.
    """
    height, width, channels = pixels.shape
    halves = channels <= MAX_CHANNELS
    while halves and min(height // size[0], width // size[1]) >= 2 * ENOUGH and height % 2 == width % 2 == 0:
        height, width = height // 2, width // 2
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        pixels = pixels.reshape(height, width, channels)
    return np.array(_resize(pixels, size), np.uint8)


def enlarge(heatmap: Heatmap, size: tuple[int, int]) -> Heatmap:
    """A heatmap (rows, columns) -> (height, width): half-pixel bilinear, the peak kept as it was."""
    large, unit = _enlarged(heatmap, size)
    return np.asarray(large * unit, np.float32)


def _enlarged(
    heatmap: Heatmap, size: tuple[int, int], into: Heatmap | None = None
) -> tuple[Heatmap, np.float32]:
    """A heatmap as large as it is shown, and by what it has yet to be multiplied to have its peak again."""
    large = np.asarray(_resize(heatmap, size, into), np.float32)
    peak = large.max()
    return large, heatmap.max() / peak if peak > 0 else np.float32(1)


def _resize(image: Any, size: tuple[int, int], into: Any = None) -> Any:
    """Shrink by area, so that nothing falls between two pixels; then enlarge bilinearly, `into` an array."""
    height, width = size
    if image.ndim == COLOR_RANK and image.shape[2] > MAX_CHANNELS:
        parts = [image[..., at : at + MAX_CHANNELS] for at in range(0, image.shape[2], MAX_CHANNELS)]
        return np.concatenate([_resize(part, size) for part in parts], axis=2)
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    resized = image
    for (high, wide), way, kept in ((smaller, cv2.INTER_AREA, None), (size, cv2.INTER_LINEAR, into)):
        if resized.shape[:2] != (high, wide):
            resized = cv2.resize(resized, (wide, high), kept, interpolation=way)
    return resized.reshape(height, width, *image.shape[2:])  # OpenCV drops an axis of one channel


@lru_cache
def colors(colormap: str) -> Pixels:
    """The 256 RGB colours of a colour map, (256, 1, 3)."""
    ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
    code = COLORMAPS[colormap]
    if code is None:
        return np.asarray(cv2.cvtColor(ramp, cv2.COLOR_GRAY2RGB), np.uint8)
    return np.asarray(cv2.applyColorMap(ramp, code)[..., ::-1], np.uint8)


@lru_cache
def _share_of_colors(colormap: str, alpha: float) -> Pixels:
    """The colours of a colour map in RGB, `alpha` of each, (256, 1, 3)."""
    return np.asarray(np.rint(alpha * colors(colormap)), np.uint8)


class Base:
    """A picture (height, width, 3) that many heatmaps are laid over, by one thread: its share is taken once.

    The colours' share is taken of the 256 colours, so that a heatmap costs a look-up and a sum for each
    pixel. Both shares are rounded: a level is at most 1 away from that of the blend rounded once.
    """

    def __init__(
        self, pixels: Pixels, *, alpha: float = 0.4, colormap: str = "jet", bgr: bool = False
    ) -> None:
        """`alpha` of colour, the rest picture. With `bgr`, what is laid is in the encoders' order."""
        self._colors = _share_of_colors(colormap, alpha)
        if bgr:
            pixels, self._colors = (cv2.cvtColor(one, cv2.COLOR_RGB2BGR) for one in (pixels, self._colors))
        self._share = cv2.convertScaleAbs(pixels, pixels if bgr else None, alpha=1 - alpha)
        self._large = np.empty(pixels.shape[:2], np.float32)  # new memory costs more than what is done in it

    def lay(self, heatmap: Heatmap, *, into: Pixels | None = None) -> Pixels:
        """A heatmap (rows, columns) in [0, 1] over the picture (height, width, 3), in a new array or `into`.

        The floats are enlarged first, then coloured: a few rows at a time, which stay in the cache.
        """
        height, width, _ = self._share.shape
        large, unit = _enlarged(heatmap, (height, width), self._large)
        laid = np.empty_like(self._share) if into is None else into
        step = max(STRIP // width, 1)
        for top in range(0, height, step):
            rows = slice(top, top + step)
            levels = cv2.convertScaleAbs(large[rows], alpha=255 * float(unit))
            cv2.add(cv2.applyColorMap(levels, self._colors), self._share[rows], laid[rows])
        return laid


def overlay(pixels: Pixels, heatmap: Heatmap, *, alpha: float = 0.4, colormap: str = "jet") -> Pixels:
    """Lay a heatmap (rows, columns) in [0, 1] over a picture (height, width, 3), at the picture's size.

    The floats are enlarged first, then coloured, then blended: `alpha` of colour, the rest picture.
    """
    return Base(pixels, alpha=alpha, colormap=colormap).lay(heatmap)


def grey(heatmap: Heatmap, size: tuple[int, int]) -> Pixels:
    """A heatmap (rows, columns) in [0, 1] -> (height, width) uint8: 255 is the peak."""
    large, unit = _enlarged(heatmap, size)
    return np.asarray(cv2.convertScaleAbs(large, alpha=255 * float(unit)), np.uint8)


def within_edge(pixels: Pixels, max_edge: int | None) -> Pixels:
    """A picture whose longer side is at most `max_edge` pixels, in its own proportions; never enlarged.

    One that is no longer than that is returned as it is.
    """
    height, width, _ = pixels.shape
    scale = min((max_edge or max(height, width)) / max(height, width), 1)
    if scale == 1:
        return pixels
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


def encode(pixels: Pixels, kind: str = "jpeg", *, bgr: bool = False) -> bytes:
    """RGB (height, width, 3) or grey (height, width) -> bytes: JPEG, PNG or WebP, always the same bytes.

    With `bgr`, the pixels are in the order that encoders take, and need not be swapped.
    """
    if kind == "webp":
        file = io.BytesIO()
        Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if bgr else pixels).save(file, kind, **WEBP)
        return file.getvalue()
    swapped = pixels if bgr or pixels.ndim < COLOR_RANK else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(f".{EXTENSIONS[kind]}", swapped, ENCODING[kind])
    return data.tobytes()
