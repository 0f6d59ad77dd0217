"""Grad-CAM for Keras image classifiers: a library that needs no queue.

    >>> from gradcam_worker.gradcam import load_network, explain_image
    >>> network = load_network("efficientnet_lite0")
    >>> seen = explain_image(network, "coffee.jpg", top_n=3)
    >>> [(p.name, round(p.probability, 2)) for p in seen.explained]
    >>> seen.save("out/")

The map of this room, from plain data to live networks:

    catalog        the networks, one row of data each
    registry       ... and an operator's own, from a file
    registry_file  what may stand in that file, and what is wrong with it
    classes        a wish (top n, ids, wnids, names) -> the classes to explain
    decode         bytes -> pixels, guarded
    jpeg_file      what a file of each format holds, read before it is decoded: also
                   png_file, webp_file, gif_file, bmp_file
    structure      ... and what they have in common
    exif           how a picture is to be turned
    alpha          translucent pictures, laid on white
    picture        pixels -> network input; heatmap -> overlay
    region         the hot region of a heatmap: its box, its contour, both drawn on a picture
    sheet          pictures with titles, on one sheet or in frames
    animation      frames -> an animated GIF or WebP
    cam            the formulas
    network        what a network must be able to do
    explain        one image, one network, one wish -> predictions, heatmaps, overlays
    report         an explanation -> one HTML page that needs nothing else
    residents      the networks a process keeps loaded, and how many images each takes at once
    batcher        many job threads, one device: their images merged into batches
    batch          what waits for the device, and what comes back from it
    weights        where a row's weights come from
    shelf          ... and the folder where an operator's files are kept
    loading        a row, or any Keras model -> a live network
    keras_network  a live network: what is computed, and what is kept
    gradients      one forward and one gradient pass, and the few lines per backend
    shortcut       where the way back may end earlier, found in the graph
    slopes         what a method takes the gradient of
    target         the layer to explain, found in the graph
    axes           what the axes of every tensor in the graph mean
    head           the scores before the last activation, found in the graph
    dissect        a Keras model -> its graph
    graph          a network as a flat list of steps, and its cut
    precision      a model in another precision
    lite           EfficientNet-Lite0, which Keras does not have
    backend        the only import of keras
"""

import os
from typing import TYPE_CHECKING, Any

# OpenCV reads this once, when it is first imported, so it has to be set before any module of this
# room does so. It is the last line of defence: `decode` refuses such pictures by their headers.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**28))
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # damaged images are reported as errors, not on stderr

if TYPE_CHECKING:
    from gradcam_worker.gradcam.explain import Explained as Explained
    from gradcam_worker.gradcam.explain import explain_image as explain_image
    from gradcam_worker.gradcam.models.loading import load_network as load_network
    from gradcam_worker.gradcam.models.loading import wrap_model as wrap_model

__all__ = ["Explained", "explain_image", "load_network", "wrap_model"]

_HOMES = {
    "Explained": "gradcam_worker.gradcam.explain",
    "explain_image": "gradcam_worker.gradcam.explain",
    "load_network": "gradcam_worker.gradcam.models.loading",
    "wrap_model": "gradcam_worker.gradcam.models.loading",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: TensorFlow takes seconds to load."""
    from importlib import import_module

    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(_HOMES[name]), name)
