"""Pictures one after the other, for ever: an animated GIF or WebP."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gradcam_worker.gradcam.imaging.overlay import WEBP, Pixels, fit

MEDIA_TYPES = {"gif": "image/gif", "webp": "image/webp"}
PIXELS = 64_000_000  # of all frames together: they are in memory at once
LONGEST = 16_000  # pixels of a side: WebP has no more than 16383, and a title takes some
LEAST = 240  # pixels of a photo's longer side: a smaller one is enlarged, where it may be so large
SAMPLED = 10_000  # pixels of all frames that the palette is chosen from


def as_frame(pixels: Pixels, max_edge: int, count: int) -> Pixels:
    """A photo (height, width, 3) as large as it is in each of `count` frames: within `max_edge`.

    It is smaller than that where all frames together would have more than `PIXELS`.
    """
    height, width, _ = pixels.shape
    longer = max(height, width)
    edge = min(max_edge, max(longer, LEAST), LONGEST)
    scale = min(edge / longer, (PIXELS / (count * height * width)) ** 0.5)
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


def animate(frames: Sequence[Pixels], *, kind: str, frame_s: float) -> bytes:
    """Frames (height, width, 3) of one size -> a GIF or a WebP; always the same bytes.

    Each is shown for `frame_s` seconds, of which GIF counts hundredths. A GIF's frames share one palette,
    with which it is made in a tenth of the time that it takes with one for each.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    options: dict[str, Any] = dict(WEBP)
    if kind == "gif":
        palette = _palette(frames)
        pictures = [picture.quantize(palette=palette) for picture in pictures]  # Floyd and Steinberg's dither
        options = {"palette": bytes(palette.getpalette() or ())}  # else each frame gets one of its own
    file = io.BytesIO()
    first, *others = pictures
    duration = round(frame_s * 1000)
    first.save(file, kind, save_all=True, append_images=others, duration=duration, loop=0, **options)
    return file.getvalue()


def _palette(frames: Sequence[Pixels]) -> Image.Image:
    """256 colours that serve all frames, chosen from a mosaic of them.

    They cover the extremes; a median cut leaves those out, and dithering then strews specks about them.
    """
    step = int(np.ceil((sum(frame.size / 3 for frame in frames) / SAMPLED) ** 0.5))
    mosaic = np.concatenate([frame[::step, ::step] for frame in frames])
    return Image.fromarray(mosaic).quantize(256, Image.Quantize.MAXCOVERAGE)
