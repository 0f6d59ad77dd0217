"""What takes the place of pixels: for metrics, Integrated Gradients, RISE and occlusion."""

import cv2

from gradcam_worker.gradcam.imaging.resize import Pixels

GREY = 127  # level: most preprocessings make about the mean of all photos of it
BLUR = 0.05  # standard deviation, as a share of the longer side: about 11 of 224 pixels


def blurred(pixels: Pixels) -> Pixels:
    """Blur an image until no detail is left.

    Args:
        pixels: (height, width, channels), uint8.

    Returns:
        A new array of the same shape.
    """
    smooth: Pixels = cv2.GaussianBlur(pixels, (0, 0), BLUR * max(pixels.shape[:2]))
    return smooth.reshape(pixels.shape)
