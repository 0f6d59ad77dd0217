"""Integrated Gradients and metrics against captum and xplique, with the same network on the same photos.

Needs the environment that `masking` describes. Then:

    PYTHONPATH=scripts python -P -m devtools.agreement.peers

What is compared, for the best class of each photo:

* attributions with captum's Integrated Gradients, for the class and against the second best one: its line and
  its quadrature, over gradients of a plain tape;
* `confidence_drop` and `confidence_increase` with xplique's Average Drop and Average Increase, for heatmaps
  scaled from 0 to 1 as it scales them, its products rounded to whole levels as ours are (without that, the
  drops differ by up to .06);
* the parameter randomisation with xplique's Model Randomization, for Grad-CAM by a plain tape. Its model gets
  the weights that were shuffled in ours: its own are drawn anew.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.agreement.photos import photographs
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.faithfulness import measure
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.gradcam.models.loading import load_network
from gradcam_worker.gradcam.network import Method
from gradcam_worker.gradcam.randomization import randomize_parameters

Floats = NDArray[np.float32]
STEPS = 32


def largest(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest value of ours."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(ours).max())


def captum_attributions(network: Any, pixels: Floats, plus: int, minus: int | None) -> Floats:
    """Captum's Integrated Gradients from black, (height, width), of one score or of a difference."""
    import tensorflow as tf
    import torch
    from captum.attr import IntegratedGradients

    class Explained(torch.autograd.Function):  # type: ignore[misc]  # torch ships no types here
        """The network as a function of PyTorch, whose gradient is that of a tape."""

        @staticmethod
        def forward(context: Any, images: Any) -> Any:
            values = tf.constant(images.detach().permute(0, 2, 3, 1).contiguous().numpy())
            with tf.GradientTape() as tape:
                tape.watch(values)
                scores = network._scores_of(values)  # noqa: SLF001  # the same weights for both
                explained = scores[:, plus] - (0 if minus is None else scores[:, minus])
            context.gradient = torch.from_numpy(tape.gradient(explained, values).numpy()).permute(0, 3, 1, 2)
            return torch.from_numpy(explained.numpy())

        @staticmethod
        def backward(context: Any, gradient: Any) -> Any:
            return gradient[:, None, None, None] * context.gradient

    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])
    found = IntegratedGradients(Explained.apply).attribute(image, n_steps=STEPS, internal_batch_size=8)
    return np.asarray(found[0].sum(0).numpy(), np.float32)


def attributions(network: Any, photos: NDArray[np.uint8]) -> list[tuple[float, float]]:
    """Differences for each photo: of the best class, and of it against the second best one."""
    rows = []
    for pixels in photos:
        best, second = (int(one) for one in np.argsort(-network.scores(pixels[None])[0])[:2])
        row = []
        for minus in (None, second):
            against = () if minus is None else (minus,)
            method = Method(integrated.NAME, steps=STEPS, against=against)
            ours = network.compute(pixels[None], np.array([[best]], np.int32), method).raw[0, 0]
            row.append(largest(ours, captum_attributions(network, pixels.astype(np.float32), best, minus)))
        rows.append((row[0], row[1]))
    return rows


def confidence(network: Any, photos: NDArray[np.uint8]) -> list[tuple[float, float, float, float]]:
    """For each photo ours and xplique's drop, then ours and xplique's increase."""
    import keras
    from xplique.metrics import AverageDropMetric, AverageIncreaseMetric

    class Probabilities(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
        """Pixels in, which are rounded as ours are, and probabilities out."""

        def call(self, values: Any) -> Any:
            """Compute them."""
            return keras.ops.softmax(network._scores_of(keras.ops.round(values)))  # noqa: SLF001

    image = keras.Input(photos.shape[1:])
    model = keras.Model(image, Probabilities()(image))
    rows = []
    for pixels in photos:
        [seen] = explain_pixels(network, pixels[None], [(-1,)])
        heatmap = enlarge(seen.heatmaps[0], (pixels.shape[0], pixels.shape[1]))
        heatmap = (heatmap - heatmap.min()) / np.ptp(heatmap)
        scaled = replace(seen, heatmaps=heatmap[None])
        [ours] = measure(network.scores, pixels, scaled, ["confidence_drop", "confidence_increase"])
        target = np.eye(1000, dtype=np.float32)[[seen.explained[0].id]]
        theirs = [
            metric(model, pixels[None].astype(np.float32), target).evaluate(heatmap[None])
            for metric in (AverageDropMetric, AverageIncreaseMetric)
        ]
        rows.append((ours["confidence_drop"], theirs[0], ours["confidence_increase"], theirs[1]))
    return rows


class TapedGradcam:
    """Grad-CAM before the ReLU by a plain tape, as an explainer of xplique."""

    def __init__(self, model: Any, layer: str) -> None:
        self.model, self._layer = model, layer

    def explain(self, inputs: Any, targets: Any) -> Any:
        """Maps (n, rows, columns) of prepared images."""
        import keras
        import tensorflow as tf

        both = keras.Model(
            self.model.inputs, [self.model.get_layer(self._layer).output, self.model.outputs[0]]
        )
        with tf.GradientTape() as tape:
            activations, scores = both(inputs)
            explained = tf.reduce_sum(scores * targets)
        weights = tf.reduce_mean(tape.gradient(explained, activations), axis=(1, 2), keepdims=True)
        return tf.reduce_sum(activations * weights, axis=-1)


def randomization(network: Any, photos: NDArray[np.uint8]) -> tuple[float, float]:
    """Ours and xplique's rank correlation with all kernels shuffled."""
    from xplique.metrics import ModelRandomizationMetric
    from xplique.metrics.randomization import ModelRandomizationStrategy

    with network.shuffled(None, head_only=False, seed=0):
        shuffled = {variable.path: variable.numpy() for variable in network._variables()}  # noqa: SLF001

    class SameShuffling(ModelRandomizationStrategy):  # type: ignore[misc]  # as above
        def randomize(self, model: Any) -> Any:
            for variable in model.variables:
                if variable.path in shuffled:
                    variable.assign(shuffled[variable.path])
            return model

    model = network._model  # noqa: SLF001
    best = np.argmax(network.scores(photos), axis=1)
    targets = np.eye(1000, dtype=np.float32)[best]
    prepared = (photos.astype(np.float32) - 127) / 128
    metric = ModelRandomizationMetric(model, prepared, targets, SameShuffling())
    theirs = metric.evaluate(TapedGradcam(model, network.facts.default_layer))
    return randomize_parameters(network, photos).everything, float(theirs)


def main() -> None:
    """Print the figures of docs/explanation/agreement.md."""
    network = load_network("efficientnet_lite0", forward="tensorflow")
    photos = photographs(network.facts.input_size)
    print(
        "randomisation, ours and xplique's: {:.4f} {:.4f}".format(*randomization(network, photos)), flush=True
    )
    for row in confidence(network, photos):
        print("drop, ours and xplique's: {:.4f} {:.4f}; increase: {:.0f} {:.0f}".format(*row), flush=True)
    for differences in attributions(network, photos):
        print("attributions, from captum's: {:.1e}; against: {:.1e}".format(*differences), flush=True)


if __name__ == "__main__":
    main()
