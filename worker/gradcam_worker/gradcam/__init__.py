"""Grad-CAM for Keras image classifiers: a library that needs no queue.

    >>> from gradcam_worker.gradcam import load_network, explain_image
    >>> network = load_network("efficientnet_lite0")
    >>> seen = explain_image(network, "coffee.jpg", top_n=3)
    >>> [(p.name, round(p.probability, 2)) for p in seen.explained]
    >>> seen.save("out/")

The packages, from plain data to live networks:

    catalog, classes  the networks that are known, and the names of their classes
    network           what a network must be able to do
    decoding          bytes -> pixels, guarded
    imaging           pixels -> network input; heatmap -> overlay, sheet, animation
    graph             a Keras model's graph: its target layer, its scores, the shortest way back
    methods           the formulas, and the gradients that they need
    explain           one image, one network, some classes -> predictions, heatmaps, overlays
    report            an explanation -> one HTML page that needs nothing else
    models            a row of the catalog, or any Keras model -> a live network
    backend           the only import of keras
"""

import os
from typing import TYPE_CHECKING

from gradcam_worker.lazy_imports import lazy_imports

# OpenCV reads these once, when it is first imported: before any module of this package imports it. The limit
# is the last line of defence: `decode` refuses such images by their headers.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**28))
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # damaged images are reported as errors, not on stderr

if TYPE_CHECKING:
    from gradcam_worker.gradcam.catalog import Head as Head
    from gradcam_worker.gradcam.catalog import NetworkRow as NetworkRow
    from gradcam_worker.gradcam.catalog import Preprocessing as Preprocessing
    from gradcam_worker.gradcam.decoding.decode import Limits as Limits
    from gradcam_worker.gradcam.explain import Explained as Explained
    from gradcam_worker.gradcam.explain import Explanation as Explanation
    from gradcam_worker.gradcam.explain import Prediction as Prediction
    from gradcam_worker.gradcam.explain import explain_image as explain_image
    from gradcam_worker.gradcam.models.loading import load_network as load_network
    from gradcam_worker.gradcam.models.loading import wrap_model as wrap_model
    from gradcam_worker.gradcam.network import Method as Method
    from gradcam_worker.gradcam.network import Network as Network

__all__ = [
    "Explained",
    "Explanation",
    "Head",
    "Limits",
    "Method",
    "Network",
    "NetworkRow",
    "Prediction",
    "Preprocessing",
    "explain_image",
    "load_network",
    "wrap_model",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "Explained": "gradcam_worker.gradcam.explain",
            "Explanation": "gradcam_worker.gradcam.explain",
            "Head": "gradcam_worker.gradcam.catalog",
            "Limits": "gradcam_worker.gradcam.decoding.decode",
            "Method": "gradcam_worker.gradcam.network",
            "Network": "gradcam_worker.gradcam.network",
            "NetworkRow": "gradcam_worker.gradcam.catalog",
            "Prediction": "gradcam_worker.gradcam.explain",
            "Preprocessing": "gradcam_worker.gradcam.catalog",
            "explain_image": "gradcam_worker.gradcam.explain",
            "load_network": "gradcam_worker.gradcam.models.loading",
            "wrap_model": "gradcam_worker.gradcam.models.loading",
        },
    )
