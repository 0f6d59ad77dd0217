"""What takes the place of pixels: for metrics, Integrated Gradients, RISE and occlusion."""

from typing import Any

import cv2
import numpy as np

from gradcam_worker.gradcam.network import InputPixels

GREY = 127  # level: most preprocessings make about the mean of all photos of it
BLUR = 0.05  # standard deviation, as a share of the longer side: about 11 of 224 pixels


def to_levels(values: Any, pixels: InputPixels) -> InputPixels:
    """Numbers from 0 to 255 as levels of the type of `pixels`: rounded, if they are whole."""
    return np.asarray(np.rint(values) if pixels.dtype == np.uint8 else values, pixels.dtype)


def blurred(pixels: InputPixels) -> InputPixels:
    """Blur an image until no detail is left.

    Args:
        pixels: (height, width, channels).

    Returns:
        A new array of the same shape.
    """
    smooth: InputPixels = cv2.GaussianBlur(pixels, (0, 0), BLUR * max(pixels.shape[:2]))
    return smooth.reshape(pixels.shape)
