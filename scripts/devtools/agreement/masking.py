"""RISE and occlusion against xplique and captum, with the same network and the same masks.

The two libraries are in no environment of this project. In a virtual environment of its own that also sees
the packages of `.venv` (a .pth file with the path of its site-packages), install xplique, captum and torch
with `--no-deps`, and what they import: einops, scikit-learn, scikit-image, tf_keras, tensorflow-probability,
deprecated, wrapt, seaborn, sympy and others. Then:

    PYTHONPATH=scripts python -P -m devtools.agreement.masking

What is compared: raw maps of the shipped network on the shipped photos, the best class of each. xplique
divides by the sum of the masks at each place, and we by the mean number of masks; captum has a value for each
pixel, we have the mean of a cell. Both are converted, by one line each.
"""

from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from devtools.agreement.photos import photographs
from gradcam_worker.gradcam.imaging.baseline import GREY
from gradcam_worker.gradcam.methods import masking
from gradcam_worker.gradcam.models.loading import load_network
from gradcam_worker.gradcam.network import Method

Floats = NDArray[np.float32]
MASKS = 256
WINDOW, STRIDE = 32, 16
COLUMNS = 12  # characters of a number


def to_cells(map_: NDArray[Any], grid: tuple[int, int]) -> Floats:
    """The mean of a map (height, width) in each cell of a grid (rows, columns)."""
    cells = cv2.resize(np.asarray(map_, np.float32), grid[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(cells, np.float32)


def xplique_rise(score: Callable[[Any], Any], pixels: Floats, class_id: int, masks: Floats) -> Floats:
    """The map of xplique's RISE, (height, width), with these masks."""
    import tensorflow as tf
    from xplique.attributions import Rise

    batches: Iterator[Floats] = iter(masks.reshape(-1, 16, *masks.shape[1:]))

    def apply(image: Any, _: Any, mask_value: float) -> tuple[Any, Any]:
        kept = tf.constant(next(batches))[..., None]
        return tf.round((image[None] - mask_value) * kept + mask_value), kept

    Rise._apply_masks = staticmethod(apply)  # noqa: SLF001  # its own masks are random, and not seeded alone
    model = keras_model(score, pixels.shape)
    explainer = Rise(model, batch_size=16, nb_samples=len(masks), mask_value=GREY)
    target = np.eye(1000, dtype=np.float32)[[class_id]]
    return np.asarray(explainer(pixels[None], target), np.float32).reshape(pixels.shape[:2])


def keras_model(score: Callable[[Any], Any], shape: tuple[int, ...]) -> Any:
    """A model that a peer accepts: pixels in, scores out."""
    import keras

    image = keras.Input(shape)

    class Scores(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
        """Calls a function of TensorFlow."""

        def call(self, values: Any) -> Any:
            """Compute the scores."""
            return score(values)

    return keras.Model(image, Scores()(image))


def captum_occlusion(score: Callable[[Any], Any], pixels: Floats, class_id: int) -> Floats:
    """The map of captum's occlusion, (height, width)."""
    import torch
    from captum.attr import Occlusion

    def forward(images: Any) -> Any:
        return torch.from_numpy(score(images.permute(0, 2, 3, 1).numpy()))

    attributions = Occlusion(forward).attribute(
        torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()),
        sliding_window_shapes=(3, WINDOW, WINDOW),
        strides=(3, STRIDE, STRIDE),
        baselines=GREY,
        target=class_id,
        perturbations_per_eval=16,
    )
    return np.asarray(attributions[0, 0].numpy(), np.float32)


def main() -> None:
    """Print the largest difference of raw maps, as a share of the largest value."""
    network = load_network("efficientnet_lite0", forward="tensorflow")
    size = network.facts.input_size

    def on_device(values: Any) -> Any:
        return network._scores_of(values)  # noqa: SLF001  # the same weights for both

    def on_host(values: Floats) -> Floats:
        return network.scores(values.astype(np.uint8))

    rise = masking.with_defaults(Method("rise", masks=MASKS), size)
    squares = masking.with_defaults(Method("occlusion", window=WINDOW, stride=STRIDE), size)
    masks = np.stack([mask for mask, _ in masking._masks(rise, size).draw()])  # noqa: SLF001
    print(f"{'photo':>5}{'RISE, xplique':>16}{'occlusion, captum':>20}")
    for number, pixels in enumerate(photographs(size)):
        class_id = int(network.scores(pixels[None])[0].argmax())
        ours = {
            method.name: masking.compute(network.scores, pixels, (class_id,), method, lambda scores: scores)
            for method in (rise, squares)
        }
        floats = pixels.astype(np.float32)
        covered = np.rint((floats - GREY) * masks[..., None] + GREY).astype(np.uint8)
        mean = np.mean([network.scores(part)[:, class_id] for part in covered.reshape(-1, 16, *pixels.shape)])
        theirs = (xplique_rise(on_device, floats, class_id, masks) - mean) * masks.sum(0) / (MASKS / 2)
        differences = []
        for name, map_ in (("rise", theirs), ("occlusion", captum_occlusion(on_host, floats, class_id))):
            raw = ours[name].raw[0, 0]
            differences.append(np.abs(raw - to_cells(map_, raw.shape)).max() / np.abs(raw).max())
        print(f"{number:>5}{differences[0]:>16.1e}{differences[1]:>20.1e}", flush=True)


if __name__ == "__main__":
    main()
