"""Conversion of an image's colours to sRGB, by LittleCMS.

What a file says about its colours is an untrusted `ColorTag`. One that says nothing new (most profiles are
those of sRGB), is damaged, or does not fit the pixels changes nothing. What was made of a tag is kept by its
digest: a profile that many images share costs a digest for each.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import cv2
import numpy as np
from PIL import Image, ImageCms

from gradcam_worker.gradcam.decoding import coding_points, icc_profile
from gradcam_worker.gradcam.decoding.icc_profile import CMYK, GREY, RGB
from gradcam_worker.gradcam.decoding.structure import CICP, GAMMA, ICC, ColorTag, Pixels
from gradcam_worker.text.visible import visible

SPACES: Mapping[int, str] = MappingProxyType(
    {1: GREY, 3: RGB, 4: CMYK}
)  # of an image with so many components
MODES: Mapping[str, str] = MappingProxyType({GREY: "L", RGB: "RGB", CMYK: "CMYK"})  # Pillow's names
MAX_KEPT = 16  # conversions; one from CMYK takes 2 MB
STRIP_ROWS = 256  # converted at a time
MAX_NAME = 100  # characters
SAME_LEVELS = 2  # a profile that changes no colour by more is that of sRGB, rounded in another way
LATTICE = 9  # levels of each channel at which a profile is compared with sRGB


@dataclass(frozen=True)
class ColorSource:
    """The colour space from which an image was converted.

    Attributes:
        kind: As of a `ColorTag`.
        name: The description in the profile, the code points, or the gamma. Safe to print.
    """

    kind: str
    name: str


class Conversion:
    """Converts pixels of one colour space to sRGB. For any number of threads."""

    def __init__(self, source: ColorSource, space: str, transform: ImageCms.ImageCmsTransform) -> None:
        """`space`: of the pixels that `transform` takes; it returns RGB."""
        self.source = source
        self._transform = transform
        self._greys: Pixels | None = None
        if space == GREY:
            ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[np.newaxis])
            self._greys = np.ascontiguousarray(
                np.asarray(transform.apply(ramp))[0, :, 1]
            )  # three equal channels

    def convert_rows(self, rows: Image.Image) -> Image.Image:
        """Convert an image of mode RGB or CMYK; a grey one is RGB, too."""
        if self._greys is not None:
            return rows.point(self._greys.tolist() * 3)
        return self._transform.apply(rows)

    def convert_rgb(self, pixels: Pixels) -> None:
        """Convert pixels (height, width, 3), uint8, RGB, in place."""
        if self._greys is not None:
            cv2.LUT(pixels, self._greys, dst=pixels)
            return
        for top in range(0, len(pixels), STRIP_ROWS):
            rows = pixels[top : top + STRIP_ROWS]
            rows[:] = np.asarray(self._transform.apply(Image.fromarray(rows)))

    def convert_cmyk(self, inks: Pixels) -> Pixels:
        """Convert pixels (height, width, 4), uint8, inverted CMYK as JPEGs store it.

        Returns:
            (height, width, 3), uint8, RGB.
        """
        pixels = np.empty((*inks.shape[:2], 3), np.uint8)
        for top in range(0, len(inks), STRIP_ROWS):
            strip = 255 - inks[top : top + STRIP_ROWS]
            rows = Image.frombuffer("CMYK", strip.shape[1::-1], strip, "raw", "CMYK", 0, 1)
            pixels[top : top + STRIP_ROWS] = np.asarray(self._transform.apply(rows))
        return pixels


_kept: OrderedDict[tuple[bytes, str], Conversion | None] = OrderedDict()
_kept_lock = threading.Lock()


def find_conversion(tag: ColorTag | None, components: int) -> Conversion | None:
    """Find how to convert the pixels of an image to sRGB.

    Args:
        tag: What its file says; None: nothing.
        components: Of its stored pixels: 1 (grey), 3 (RGB) or 4 (CMYK).

    Returns:
        The conversion; None if the pixels are to be taken as they are.
    """
    if tag is None or components not in SPACES:
        return None
    space = SPACES[components] if tag.kind == ICC else RGB
    key = tag.digest, space
    with _kept_lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    conversion = _make_conversion(tag, space)
    with _kept_lock:
        _kept[key] = conversion
        if len(_kept) > MAX_KEPT:
            _kept.popitem(last=False)
    return conversion


def _make_conversion(tag: ColorTag, space: str) -> Conversion | None:
    data = icc_profile.keep_needed(tag.data) if tag.kind == ICC else _made_profile(tag)
    if data is None or space != icc_profile.color_space(data):
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = _name(tag, profile)
        transform = ImageCms.ImageCmsTransform(profile, _srgb(), MODES[space], "RGB")
        if _changes_nothing(transform, space):
            return None
        return Conversion(ColorSource(tag.kind, name), space, transform)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # whatever Pillow raises for a damaged profile
        return None


def _made_profile(tag: ColorTag) -> bytes | None:
    if tag.kind == CICP:
        return coding_points.from_cicp(tag.data)
    return coding_points.from_gamma(tag.data[:4], tag.data[4:])


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _name(tag: ColorTag, profile: ImageCms.ImageCmsProfile) -> str:
    if tag.kind == CICP:
        return "/".join(str(number) for number in tag.data)
    if tag.kind == GAMMA:
        exponent = coding_points.GAMMA_UNIT / int.from_bytes(tag.data[:4], "big")
        return f"{exponent:.3g}" + (" with its own primaries" if len(tag.data) > 4 else "")  # noqa: PLR2004  # bytes of gAMA
    description = profile.profile.profile_description or ""
    return visible(description.strip()[:MAX_NAME])


def _changes_nothing(transform: ImageCms.ImageCmsTransform, space: str) -> bool:
    """Whether a transform returns the RGB colours that it is given, or greys."""
    if space == CMYK:
        return False
    levels = np.linspace(0, 255, LATTICE).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, np.newaxis], 3, axis=1)
    colors = greys if space == GREY else np.concatenate([lattice, greys])
    given = Image.fromarray(colors[np.newaxis, :, 0] if space == GREY else colors[np.newaxis])
    difference = np.asarray(transform.apply(given), np.int16)[0] - colors
    return bool(np.abs(difference).max() <= SAME_LEVELS)
