"""The arithmetic of the notebook that this project started from, transcribed to be measured against."""

from collections.abc import Iterable
from typing import Any

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.network import GRADCAM, Method

# isort: split
# Only now: `backend` keeps TensorFlow quiet while it is loaded for the first time.
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

TOLERANCE = 1e-4  # between heatmaps in [0, 1]; float32, summed in another order, differs by 1e-6
CLASSES = 8  # the top 8, as in the notebook

Floats = NDArray[np.float32]


class NotebookGradCAM:
    """The notebook's arithmetic: it is nothing to learn from.

    Kinder than the original in two points: the models are built once, outside the measured time,
    and the image is already preprocessed.
    """

    def __init__(self, model: Any, layer: str, *, logits: bool = False) -> None:
        """Split `model` behind `layer`; `logits` leaves out the softmax that the notebook keeps."""
        target = model.get_layer(layer)
        behind = model.layers[model.layers.index(target) + 1 :]
        if logits:
            behind[-1] = _without_activation(behind[-1])
        start = result = keras.Input(target.output.shape[1:])
        for layer_behind in behind:
            result = layer_behind(result)
        self._trunk = keras.Model(model.inputs[0], target.output)
        self._classifier = keras.Model(start, result)

    def top(self, image: Floats, classes: int = CLASSES) -> Floats:
        """Heatmaps (k, rows, columns) of the top k classes of one image (1, height, width, 3)."""
        scores = self._classifier(self._trunk(image)).numpy()[0]
        return self.named(image, np.argsort(-scores)[:classes])

    def named(self, image: Floats, class_ids: Iterable[int]) -> Floats:
        """Heatmaps (k, rows, columns) of k classes of one image (1, height, width, 3)."""
        return np.stack([self._heatmap(image, int(class_id)) for class_id in class_ids])

    def _heatmap(self, image: Floats, class_id: int) -> Floats:
        """One class: everything from the start, the trunk too."""
        with tf.GradientTape() as tape:
            activations = self._trunk(image)
            tape.watch(activations)
            score = self._classifier(activations)[:, class_id]
        slope = tape.gradient(score, activations)
        weights = tf.reduce_mean(slope, axis=(0, 1, 2)).numpy()
        weighted = activations.numpy()[0]
        for channel in range(len(weights)):
            weighted[:, :, channel] *= weights[channel]
        together = weighted.mean(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN where all is zero, as there
            return np.asarray(np.maximum(together, 0) / together.max(), np.float32)


def _without_activation(dense: Any) -> Any:
    """A copy of a dense layer that stops before its activation."""
    copy = keras.layers.Dense(dense.units, name=f"{dense.name}_logits")
    copy.build(dense.kernel.shape[:1])
    copy.set_weights(dense.get_weights())
    return copy


def check(
    network: KerasNetwork,
    notebook: NotebookGradCAM,
    pixels: NDArray[np.uint8],
    prepared: Floats,
    wanted: NDArray[np.int32],
    method: Method = GRADCAM,
) -> dict[str, float]:
    """Compare our heatmaps of one image (1, height, width, 3), k classes, with the notebook's.

    Returns:
        The largest `difference`, how many heatmaps were `compared`, and how many of them are `lit`, not all
        zeros: the ones that prove something.
    """
    computed = network.compute(pixels, wanted, method)
    ours = cam.heatmaps(computed.raw[0])
    theirs = np.nan_to_num(notebook.named(prepared, computed.class_ids[0]))
    lit = int(np.count_nonzero(ours.max(axis=(1, 2))))
    return {"difference": float(np.abs(ours - theirs).max()), "compared": len(ours), "lit": lit}
