"""Images that networks are tried with when they are loaded."""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit

PHOTOS = ("astronaut", "chelsea", "coffee")


def varied_images(size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Noise, black, white, a gradient from black to white, and photos.

    Args:
        size: (height, width, channels).

    Returns:
        (7, height, width, channels).
    """
    gradient = np.broadcast_to(np.linspace(0, 255, size[1])[:, None], size)
    noise = np.random.default_rng(0).integers(0, 256, size)
    images = [noise, np.zeros(size), np.full(size, 255), gradient]
    for photo in PHOTOS:
        pixels = fit(decode((DATA / "photos" / f"{photo}.jpg").read_bytes()).pixels, size[:2])
        images.append(pixels[..., np.arange(size[2]) % pixels.shape[2]])
    return np.stack(images).astype(np.uint8)
