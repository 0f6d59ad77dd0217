"""Grad-CAM for Keras image classifiers, as a library without a queue.

    >>> from gradcam_worker.gradcam import load_network, explain_image
    >>> network = load_network("efficientnet_lite0")
    >>> explanation = explain_image(network, "coffee.jpg", top_n=3)
    >>> [(prediction.name, round(prediction.probability, 2)) for prediction in explanation.explained]
    >>> explanation.save("out/")

The modules and packages, from plain data to loaded networks:

    catalog, classes  the networks of the catalog, and the names of classes
    sizing            how photos are brought to the input size of a network
    network           the interface of a network
    network_inputs    what a network takes beside the image
    decoding          image files to pixels, with limits on size and damage
    imaging           network inputs; overlays, sheets and animations of heatmaps
    graph             the graph of a Keras model: target layer, scores, backward pass
    methods           the formulas, and the gradients that they need
    explain           predictions, heatmaps and overlays of classes in an image
    faithfulness      how faithful an explanation is: deletion, insertion, change of confidence
    report            an explanation as a self-contained HTML page
    files             files of models: formats, weights, labels, the cache of downloads
    registry          an operator's own networks
    models            loading a network of the catalog, or any Keras model
    score_networks    networks that only give scores: any function, ONNX, TFLite
    randomization     how far heatmaps depend on what a network has learned
    conversion        files of other formats to `.keras`
    backend           Keras and its backend
"""

import os
from typing import TYPE_CHECKING

from gradcam_worker.lazy_imports import lazy_imports

# OpenCV reads these variables when it is first imported, after this. `decode` refuses such images by their
# headers; the limit here is a second check.
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
    from gradcam_worker.gradcam.models.hub_preset import load_preset as load_preset
    from gradcam_worker.gradcam.models.loading import load_network as load_network
    from gradcam_worker.gradcam.models.loading import wrap_model as wrap_model
    from gradcam_worker.gradcam.network import Method as Method
    from gradcam_worker.gradcam.network import Network as Network
    from gradcam_worker.gradcam.network_inputs import NetworkInput as NetworkInput
    from gradcam_worker.gradcam.score_networks.score_files import load_score_network as load_score_network
    from gradcam_worker.gradcam.score_networks.score_network import wrap_callable as wrap_callable
    from gradcam_worker.gradcam.sizing import Placement as Placement
    from gradcam_worker.gradcam.sizing import Sizing as Sizing

__all__ = [
    "Explained",
    "Explanation",
    "Head",
    "Limits",
    "Method",
    "Network",
    "NetworkInput",
    "NetworkRow",
    "Placement",
    "Prediction",
    "Preprocessing",
    "Sizing",
    "explain_image",
    "load_network",
    "load_preset",
    "load_score_network",
    "wrap_callable",
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
            "NetworkInput": "gradcam_worker.gradcam.network_inputs",
            "NetworkRow": "gradcam_worker.gradcam.catalog",
            "Placement": "gradcam_worker.gradcam.sizing",
            "Prediction": "gradcam_worker.gradcam.explain",
            "Preprocessing": "gradcam_worker.gradcam.catalog",
            "Sizing": "gradcam_worker.gradcam.sizing",
            "explain_image": "gradcam_worker.gradcam.explain",
            "load_network": "gradcam_worker.gradcam.models.loading",
            "load_preset": "gradcam_worker.gradcam.models.hub_preset",
            "load_score_network": "gradcam_worker.gradcam.score_networks.score_files",
            "wrap_callable": "gradcam_worker.gradcam.score_networks.score_network",
            "wrap_model": "gradcam_worker.gradcam.models.loading",
        },
    )
