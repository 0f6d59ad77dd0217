"""Animated GIF and WebP files, which repeat for ever."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gradcam_worker.gradcam.imaging.overlay import WEBP_OPTIONS
from gradcam_worker.gradcam.imaging.resize import Pixels, fit

MEDIA_TYPES = {"gif": "image/gif", "webp": "image/webp"}
MAX_PIXELS = 64_000_000  # of all frames, which are in memory together
MAX_SIDE = 16_000  # in pixels: that of a WebP is 16383, and a title takes some of it
MIN_EDGE = 240  # in pixels: an image whose longer side is shorter is enlarged, up to `max_edge`
PALETTE_SAMPLES = 10_000  # pixels of all frames from which the palette is chosen


def as_frame(pixels: Pixels, max_edge: int, count: int) -> Pixels:
    """Resize an image in proportion to its size in an animation.

    Args:
        pixels: (height, width, 3), uint8, RGB.
        max_edge: Longest side in pixels.
        count: Number of frames, which together may have `MAX_PIXELS` pixels.

    Returns:
        The resized image, uint8.
    """
    height, width, _ = pixels.shape
    longer = max(height, width)
    edge = min(max_edge, max(longer, MIN_EDGE), MAX_SIDE)
    scale = min(edge / longer, (MAX_PIXELS / (count * height * width)) ** 0.5)
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


def animate(frames: Sequence[Pixels], *, kind: str, frame_s: float) -> bytes:
    """Encode an animation. The same frames always give the same bytes.

    The frames of a GIF share one palette, which takes a tenth of the time that one palette each would take.

    Args:
        frames: (height, width, 3), uint8, RGB, all of one size.
        kind: `gif` or `webp`.
        frame_s: Duration of each frame in seconds; GIF rounds it to hundredths.

    Returns:
        The file.
    """
    images = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = dict(WEBP_OPTIONS)
    if kind == "gif":
        palette = _palette(frames)
        images = [image.quantize(palette=palette) for image in images]  # with Floyd-Steinberg dithering
        options = {"palette": bytes(palette.getpalette() or ())}  # else each frame gets its own
    file = io.BytesIO()
    first, *other_images = images
    duration = round(frame_s * 1000)
    first.save(file, kind, save_all=True, append_images=other_images, duration=duration, loop=0, **options)
    return file.getvalue()


def _palette(frames: Sequence[Pixels]) -> Image.Image:
    """A palette of 256 colours for all frames, chosen from a sample of their pixels.

    It covers the extreme colours. A median cut does not, and dithering then adds specks around them.
    """
    step = int(np.ceil((sum(frame.size / 3 for frame in frames) / PALETTE_SAMPLES) ** 0.5))
    mosaic = np.concatenate([frame[::step, ::step] for frame in frames])
    return Image.fromarray(mosaic).quantize(256, Image.Quantize.MAXCOVERAGE)
