"""The input of a network, made of a photo as its owner's tools do it: see `gradcam_worker.gradcam.sizing`."""

import io
from dataclasses import replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gradcam_worker.errors import ImagePixelsExceeded
from gradcam_worker.gradcam.catalog import Preprocessing
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging.resize import MAX_OPENCV_CHANNELS, Pixels, fit
from gradcam_worker.gradcam.network import InputPixels
from gradcam_worker.gradcam.sizing import Grey, Layout, Size, Sizing

Window = tuple[slice, slice]  # rows and columns

PILLOW_FILTERS = {
    "bilinear_antialias": Image.Resampling.BILINEAR,
    "bicubic_antialias": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
OPENCV_FILTERS = {
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "lanczos4": cv2.INTER_LANCZOS4,
}
SKIMAGE_TRUNCATION = 4.0  # of the Gaussian, in standard deviations: that of SciPy
SKIMAGE_STRIP_ROWS = 8  # of the result at least: the blur reaches two rows further on both sides
TENSORFLOW_LUMINANCE = (0.2989, 0.587, 0.114)  # of red, green and blue
TENSORFLOW_CORNERS = {"bilinear_tf": 0.5, "bilinear_tf1": 0.0}
MAX_RESIZED_PIXELS = 2**24  # of which a centre is cut out: a photo of 1 x 60,000 pixels would have billions
STRIP_PIXELS = 2**16  # computed in float32 at a time, which takes 4 MB for a photo
MAX_ASPECT = 4  # is allowed in any case, however large the input
MAX_JPEG_SIDE = 65_500  # in pixels: that of libjpeg


def to_input(pixels: Pixels, input_size: Size, sizing: Sizing) -> InputPixels:
    """Bring an image to the input size of a network.

    Args:
        pixels: (height, width, channels), uint8.
        input_size: (height, width) in pixels.
        sizing: How.

    Returns:
        A new array (*input_size, channels), uint8, or float32 if the sizing gives fractions of levels.

    Raises:
        ImagePixelsExceeded: The image is so long and narrow that it would have too many pixels before its
            centre is cut out, or would be too long for a JPEG.
    """
    if sizing.grey:
        grey = _to_grey(pixels, sizing.grey)[..., np.newaxis]
        alike = to_input(grey, input_size, replace(sizing, grey=False, color=sizing.color[:1]))
        return np.repeat(alike, pixels.shape[2], axis=2)
    layout = sizing.layout((pixels.shape[0], pixels.shape[1]), input_size)
    _check_size(pixels, layout.resized, sizing)
    window, place = _window(layout, input_size)
    if sizing.recompress is None:
        part = _resize(pixels, layout.resized, sizing, window)
    else:
        whole = _resize(pixels, layout.resized, sizing, (slice(None), slice(None)))
        part = _recompress(whole, sizing.recompress)[window]
    if layout.resized == input_size:
        return part
    canvas = np.empty((*input_size, pixels.shape[2]), part.dtype)
    canvas[:] = sizing.color
    canvas[place] = part
    return canvas


def _window(layout: Layout, size: Size) -> tuple[Window, Window]:
    """The part of the resized image that is in the input, and where it lies there."""
    offsets = layout.top, layout.left
    rows, columns = (
        slice(max(offset, 0), min(offset + side, length))
        for offset, side, length in zip(offsets, size, layout.resized, strict=True)
    )
    down, across = (
        slice(max(-offset, 0), min(length - offset, side))
        for offset, side, length in zip(offsets, size, layout.resized, strict=True)
    )
    return (rows, columns), (down, across)


def _to_grey(pixels: Pixels, how: bool | Grey) -> Pixels:  # as in `Sizing.grey`
    """The luminance of a photo, (height, width)."""
    if how is True:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    weights = np.array(TENSORFLOW_LUMINANCE, np.float32)[:: -1 if how == "tf_bgr" else 1]
    grey, step = np.empty(pixels.shape[:2], np.uint8), max(STRIP_PIXELS // pixels.shape[1], 1)
    for first in range(0, len(pixels), step):
        rows = slice(first, first + step)
        grey[rows] = pixels[rows] / np.float32(255) @ weights * np.float32(255.5)  # and cut off
    return grey


def _check_size(pixels: Pixels, resized: Size, sizing: Sizing) -> None:
    height, width, _ = pixels.shape
    if sizing.recompress is not None and max(resized) > MAX_JPEG_SIDE:
        message = (
            f"The image of {width} x {height} pixels is too long to be recompressed: a side would have "
            f"{max(resized):,} pixels before its centre is cut out; a JPEG has {MAX_JPEG_SIDE:,} at most."
        )
        raise ImagePixelsExceeded(message)
    count = resized[0] * resized[1]
    if count > max(MAX_RESIZED_PIXELS, MAX_ASPECT * min(resized) ** 2):
        message = (
            f"The image of {width} x {height} pixels is too long for a centre crop: it would have "
            f"{count:,} pixels before; at most {MAX_RESIZED_PIXELS:,} are allowed."
        )
        raise ImagePixelsExceeded(message)


def _recompress(pixels: InputPixels, quality: int) -> Pixels:
    """Write an image as JPEG, as Pillow does, and read it again."""
    levels = np.rint(pixels).astype(np.uint8)
    image, file = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels), io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    limits = Limits(max_pixels=levels.size, max_side=MAX_JPEG_SIDE)  # checked before
    return decode(file.getvalue(), limits).pixels[..., : levels.shape[2]]


def _resize(pixels: Pixels, size: Size, sizing: Sizing, window: Window) -> InputPixels:
    """A window of the resized image. Where it has fractions of levels, no other rows are computed."""
    if pixels.shape[:2] == size:
        return pixels[window].astype(sizing.pixel_type)
    if sizing.resize == "skimage":
        return _resize_as_scikit_image(pixels, size, window)
    if sizing.resize in TENSORFLOW_CORNERS:
        return _resize_as_tensorflow(pixels, size, TENSORFLOW_CORNERS[sizing.resize], window)
    if sizing.resize == "area":
        return fit(pixels, size)[window]
    return _resize_to_whole_levels(pixels, size, sizing)[window]


def _resize_to_whole_levels(pixels: Pixels, size: Size, sizing: Sizing) -> Pixels:
    resized = np.empty((*size, pixels.shape[2]), np.uint8)
    if sizing.resize in OPENCV_FILTERS:
        for first in range(0, pixels.shape[2], MAX_OPENCV_CHANNELS):
            channels = np.s_[..., first : first + MAX_OPENCV_CHANNELS]
            shrunk = cv2.resize(pixels[channels], size[::-1], interpolation=OPENCV_FILTERS[sizing.resize])
            resized[channels] = shrunk.reshape(resized[channels].shape)  # OpenCV drops an axis of one channel
        return resized
    if sizing.resize == "nearest":
        rows, columns = map(_nearest, pixels.shape[:2], size)
        return np.ascontiguousarray(pixels[rows[:, np.newaxis], columns])
    # One channel at a time: Pillow would store three as four.
    for channel in range(pixels.shape[2]):
        image = Image.fromarray(np.ascontiguousarray(pixels[..., channel]))
        resized[..., channel] = np.asarray(image.resize(size[::-1], PILLOW_FILTERS[sizing.resize]))
    return resized


@lru_cache(maxsize=16)
def _nearest(length: int, resized: int) -> NDArray[np.int32]:
    """Which pixels of a side Pillow takes: it adds up a step, with its rounding."""
    numbers = Image.fromarray(np.arange(length, dtype=np.int32)[np.newaxis])
    chosen = np.asarray(numbers.resize((resized, 1), Image.Resampling.NEAREST), np.int32)
    return chosen.reshape(-1)


def _resize_as_tensorflow(pixels: Pixels, size: Size, corner: float, window: Window) -> NDArray[np.float32]:
    """Interpolate between four pixels as TensorFlow does, in its arithmetic.

    `corner` is where in a pixel its position is: 0.5, its centre, or 0 as in TensorFlow 1. OpenCV's levels
    are 0.1 too low on average.
    """
    (top, bottom, down), (left, right, across) = (
        _between(length, resized, np.float32(corner), part)
        for length, resized, part in zip(pixels.shape[:2], size, window, strict=True)
    )
    resized = np.empty((len(top), len(left), pixels.shape[2]), np.float32)
    step = max(STRIP_PIXELS // len(left), 1)
    for first in range(0, len(top), step):
        rows = slice(first, first + step)
        upper, lower = (
            _blend(strip[:, left], strip[:, right], across[:, np.newaxis])
            for strip in (pixels[top[rows]], pixels[bottom[rows]])
        )
        resized[rows] = _blend(upper, lower, down[rows, np.newaxis, np.newaxis])
    return resized


def _resize_as_scikit_image(pixels: Pixels, size: Size, window: Window) -> NDArray[np.float32]:
    """Blur what is shrunk, then interpolate between four pixels, as `skimage.transform.resize` does.

    Outside the image both continue it as in a mirror that stands on its outermost pixels.
    """
    factors = [length / resized for length, resized in zip(pixels.shape[:2], size, strict=True)]
    down, across = (_gaussian(max(0.0, (factor - 1) / 2)) for factor in factors)
    (top, below), (left, right) = (
        _split((np.arange(length)[part] + 0.5) * factor + 0.5)
        for length, factor, part in zip(size, factors, window, strict=True)
    )
    (height, width, channels), radius = pixels.shape, len(down) // 2
    west, east = _mirrored(left - 1, width), _mirrored(left, width)
    resized = np.empty((len(top), len(left), channels), np.float32)
    step = max(SKIMAGE_STRIP_ROWS, int(STRIP_PIXELS / max(width, len(left)) / max(factors[0], 1)))
    for first in range(0, len(top), step):
        rows = slice(first, first + step)
        upper = top[rows] - top[first]  # in the strip without what the blur takes from its neighbours
        strip = pixels[_mirrored(np.arange(top[first] - 1 - radius, top[rows][-1] + radius + 1), height)]
        for channel in range(channels):
            levels = strip[..., channel].astype(np.float32)
            blurred = cv2.sepFilter2D(levels, cv2.CV_32F, across, down, borderType=cv2.BORDER_REFLECT_101)
            lines = blurred.reshape(levels.shape)[radius : len(strip) - radius]
            between = _blend(lines[:, west], lines[:, east], right)
            resized[rows, :, channel] = _blend(between[upper], between[upper + 1], below[rows, np.newaxis])
    return resized


def _mirrored(places: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """The pixels of a side that are seen at places also outside it, in mirrors on its outermost pixels."""
    last = length - 1
    return np.abs((places + last) % max(2 * last, 1) - last)


def _split(places: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The pixel before each place, and how far from it that is."""
    before = np.floor(places)
    return before.astype(np.intp), (places - before).astype(np.float32)


def _gaussian(deviation: float) -> NDArray[np.float32]:
    """The weights of a Gaussian filter of SciPy; of no deviation, one that changes nothing."""
    if deviation == 0:
        return np.ones(1, np.float32)
    radius = int(SKIMAGE_TRUNCATION * deviation + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    return np.asarray(weights / weights.sum(), np.float32)


def _between(
    length: int, resized: int, corner: np.float32, part: slice
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Between which two pixels of a side each resized one of a part lies, and how far from the first."""
    scale = np.float32(length) / np.float32(resized)
    places = (np.arange(resized, dtype=np.float32)[part] + corner) * scale - corner
    before = np.floor(places)
    first = np.maximum(before, 0).astype(np.intp)
    second = np.minimum(before + 1, length - 1).astype(np.intp)
    return first, second, np.asarray(places - before, np.float32)


def _blend(first: Any, second: Any, share: NDArray[np.float32]) -> NDArray[np.float32]:
    start = first.astype(np.float32)
    return np.asarray(start + (second - start) * share, np.float32)


def preprocess(pixels: Any, preprocessing: Preprocessing, ops: Any) -> Any:
    """Preprocess pixels.

    Args:
        pixels: (n, height, width, channels) float32 in 0..255, RGB.
        preprocessing: Order of the channels, mean and standard deviation.
        ops: What computes: `keras.ops` on the device, or `numpy`.

    Returns:
        The network's input, of the same shape but for the channels.
    """
    if preprocessing.channels == "bgr":
        pixels = ops.flip(pixels, axis=-1)
    elif preprocessing.channels == "grey":
        luma = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
        pixels = ops.sum(pixels * luma, axis=-1, keepdims=True)
    elif preprocessing.channels == "grey_mean":
        pixels = ops.mean(pixels, axis=-1, keepdims=True)
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std
