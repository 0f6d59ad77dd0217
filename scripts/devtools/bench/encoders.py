"""Ways to encode an overlay, with what each takes and makes: how `picture.ENCODING` was chosen."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from devtools.bench.timing import Cost, Way, take_turns
from gradcam_worker.gradcam.imaging.overlay import EXTENSIONS, encode

# isort: split
# Only now: the package of the worker tells OpenCV how large a picture may be before it is loaded.
import cv2
from PIL import Image

Pixels = NDArray[np.uint8]


def encoders() -> dict[str, Callable[[Pixels], bytes]]:
    """Every way to encode a picture (height, width, 3) that might be chosen; ours are marked."""

    def opencv(kind: str, *flags: int) -> Callable[[Pixels], bytes]:
        return lambda pixels: bytes(cv2.imencode(f".{kind}", pixels, flags)[1].tobytes())

    def pillow(method: int) -> Callable[[Pixels], bytes]:
        def run(pixels: Pixels) -> bytes:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "webp", quality=80, method=method)
            return file.getvalue()

        return run

    quality, sampling = (cv2.IMWRITE_JPEG_QUALITY, 90), cv2.IMWRITE_JPEG_SAMPLING_FACTOR
    level, strategy = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY
    return {
        **{f"{kind} (ours)": partial(encode, kind=kind, bgr=True) for kind in EXTENSIONS},
        "jpeg optimised": opencv("jpg", *quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1),
        "jpeg progressive": opencv("jpg", *quality, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "jpeg 4:2:2": opencv("jpg", *quality, sampling, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
        "jpeg 4:4:4": opencv("jpg", *quality, sampling, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
        "png 1 default": opencv("png", level, 1, strategy, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
        "png 1 filtered": opencv("png", level, 1, strategy, cv2.IMWRITE_PNG_STRATEGY_FILTERED),
        "png 1 run length": opencv("png", level, 1, strategy, cv2.IMWRITE_PNG_STRATEGY_RLE),
        "png 1 Huffman": opencv("png", level, 1, strategy, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
        "png 3": opencv("png", level, 3),
        "webp opencv": opencv("webp", cv2.IMWRITE_WEBP_QUALITY, 80),
        **{f"webp method {method}": pillow(method) for method in range(5)},
    }


@dataclass(frozen=True)
class Encoded:
    """One encoder's cost and what it makes of one overlay."""

    cost: Cost
    kilobytes: float


def compare(laid: Pixels, repeats: int) -> dict[str, Encoded]:
    """All encoders, on the same overlay (height, width, 3) in BGR."""
    choices = encoders()
    costs = take_turns([Way(name, 1, repeats, partial(run, laid)) for name, run in choices.items()])
    return {cost.way: Encoded(cost, len(choices[cost.way](laid)) / 1000) for cost in costs}
