"""A network that only gives scores: any function of pixels. Its methods are RISE and occlusion.

Nothing here imports Keras or a backend.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import GradcamError, MethodNotSupported, NetworkIncompatible
from gradcam_worker.gradcam.catalog import (
    Head,
    HeadKind,
    NetworkRow,
    Preprocessing,
    find_preprocessing,
)
from gradcam_worker.gradcam.files import label_file
from gradcam_worker.gradcam.files.label_file import Labels
from gradcam_worker.gradcam.imaging.network_input import preprocess
from gradcam_worker.gradcam.methods import masking
from gradcam_worker.gradcam.models.sample_images import varied_images
from gradcam_worker.gradcam.network import GRADCAM, Computed, InputPixels, Method, NetworkFacts
from gradcam_worker.gradcam.sizing import Sizing, resolve_sizing
from gradcam_worker.text.visible import abridged

ROUNDING = 1e-3  # error of probabilities, and of their sum
COARSE_SUM = 0.05  # error of the sum of probabilities with eight bits
DECLARE = (
    'declare what they are: head = {kind = "softmax"} or {kind = "sigmoid"} for scores, {kind = '
    '"probabilities"} for probabilities (in Python: Head(kind="sigmoid"))'
)

Run = Callable[[NDArray[Any]], Any]  # images (n, height, width, channels) -> (n, units)


class ScoreNetwork:
    """A function from images to scores. Not thread-safe."""

    def __init__(
        self,
        row: NetworkRow,
        run: Run,
        *,
        prepares: bool = True,
        backend: str,
        dtype: str = "float32",
        weights_sha256: str | None = None,
        stored_bytes: int = 0,
        parameters: int = 0,
        coarse: bool = False,
    ) -> None:
        """Run the function on a few sample images, and find out what its outputs are.

        Args:
            row: What the registry says about the network.
            run: The function; it may be given any number of images.
            prepares: Whether it is given preprocessed images, float32; else the pixels, of the type
                `NetworkFacts.pixel_type`.
            backend: What computes, for the manifests.
            dtype: The type that it computes in.
            weights_sha256: Of its file, if it has one.
            stored_bytes: Size of its weights in memory.
            parameters: Their number, if it is known.
            coarse: Whether its outputs have eight bits.

        Raises:
            NetworkIncompatible: It cannot be run, or its outputs are no scores of classes.
        """
        self._name, self._run, self._preprocessing = row.name, run, row.preprocessing if prepares else None
        self._units = 0
        channels = row.preprocessing.pixel_channels
        samples = varied_images((*row.input_size, channels)).astype(row.sizing.pixel_type)
        outputs = self._observe(samples)
        self._units = outputs.shape[1]
        self._kind = _kind_of(row, outputs, COARSE_SUM if coarse else ROUNDING)
        self.labels = label_file.class_index(row, self._units)
        self.facts = NetworkFacts(
            name=row.name,
            input_size=row.input_size,
            preprocessing=row.preprocessing.name,
            weights_sha256=weights_sha256,
            backend=backend,
            dtype=dtype,
            default_layer=masking.LAYER,
            map_size=masking.grid_size(masking.with_defaults(Method("rise"), row.input_size), row.input_size),
            channels=channels,
            head=self._kind,
            rounding=ROUNDING,
            parameters=parameters,
            stored_bytes=stored_bytes,
            scores_only=True,
            sizing=row.sizing,
        )

    def compute(
        self,
        pixels: InputPixels,  # noqa: ARG002  # as all networks take it
        wanted: NDArray[np.int32],  # noqa: ARG002
        method: Method = GRADCAM,
    ) -> Computed:
        """See `gradcam_worker.gradcam.network.Network.compute`. Raises MethodNotSupported."""
        raise self._unsupported(method)

    def begin(
        self,
        pixels: InputPixels,  # noqa: ARG002  # as all networks take it
        wanted: NDArray[np.int32],  # noqa: ARG002
        method: Method = GRADCAM,
    ) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.Network.begin`. Raises MethodNotSupported."""
        raise self._unsupported(method)

    def _unsupported(self, method: Method) -> MethodNotSupported:
        return MethodNotSupported(f"{self._name} only gives scores; {method.name} needs gradients.")

    def scores(self, pixels: InputPixels) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.Network.scores`.

        One unit z becomes the scores (-z, z), one probability p becomes (1 - p, p).
        """
        outputs = self._outputs(pixels)
        if self._units > 1:
            return outputs
        return np.concatenate([1 - outputs if self._kind == "probabilities" else -outputs, outputs], axis=1)

    def _observe(self, pixels: InputPixels) -> NDArray[np.float64]:
        """The outputs for sample images. Raises NetworkIncompatible where they are no scores."""
        try:
            outputs = self._outputs(pixels)
        except GradcamError:
            raise
        except Exception as error:  # an untrusted function
            message = f"{self._name} cannot be run: {abridged(str(error)) or type(error).__name__}"
            raise NetworkIncompatible(message) from error
        if not np.isfinite(outputs).all():
            message = f"{self._name} returns scores for sample images that are no numbers."
            raise NetworkIncompatible(message)
        return outputs.astype(np.float64)

    def _outputs(self, pixels: InputPixels) -> NDArray[np.float32]:
        """The outputs (n, units). Raises NetworkIncompatible where they have another shape."""
        given = (
            preprocess(pixels.astype(np.float32), self._preprocessing, np) if self._preprocessing else pixels
        )
        returned = self._run(given)
        outputs = np.asarray(returned.detach().cpu() if hasattr(returned, "detach") else returned)
        count = len(pixels)
        # (n, 1, 1, classes) is what a convolution leaves.
        expected = outputs.ndim > 1 and len(outputs) == count and outputs.size == count * outputs.shape[-1]
        if not expected or (self._units and outputs.shape[-1] != self._units):
            message = (
                f"{self._name} returns an array {outputs.shape} for {count} images; a classifier's is "
                f"({count}, classes)."
            )
            raise NetworkIncompatible(message)
        return np.asarray(outputs.reshape(count, -1), np.float32)


def wrap_callable(
    function: Callable[[NDArray[Any]], Any],
    *,
    input_size: tuple[int, int],
    preprocessing: Preprocessing | str | None = None,
    sizing: Sizing | str = "area",
    labels: Labels = (),
    head: Head | None = None,
    name: str | None = None,
) -> ScoreNetwork:
    """Make a network for `explain_image` of any function that scores images: RISE and occlusion explain it.

    Args:
        function: From images (n, height, width, channels) to scores or probabilities (n, classes), as an
            array of NumPy, a tensor of PyTorch, or whatever NumPy can convert. A single column is that of
            class 1 of two.
        input_size: (height, width) of the images, in pixels.
        preprocessing: None: the function is given the pixels, uint8, RGB. Else, as for `wrap_model`: it is
            given what this makes of them, float32.
        sizing: As for `wrap_model`.
        labels: As for `wrap_model`; default: the numbers of the classes.
        head: What the outputs are; default: found out with a few sample images.
        name: Of the network; default: that of the function.

    Returns:
        A network for `explain_image`.

    Raises:
        NetworkIncompatible: The function cannot be run, or returns no scores of classes.
        InvalidSettings: There is no such sizing.

    Examples:
        ```python
        network = wrap_callable(lambda pixels: model(pixels), input_size=(224, 224))
        explain_image(network, "coffee.jpg", top_n=1, method="rise").save("out/")
        ```
    """
    found = find_preprocessing("none" if preprocessing is None else preprocessing)
    row = NetworkRow(
        name=name or str(getattr(function, "__name__", type(function).__name__)),
        input_size=input_size,
        preprocessing=found,
        sizing=resolve_sizing(sizing, found.pixel_channels),
        labels=label_file.given(labels),
        head=head or Head(),
        scores_only=True,
    )
    return ScoreNetwork(row, function, prepares=preprocessing is not None, backend="a Python function")


def _kind_of(row: NetworkRow, outputs: NDArray[np.float64], sum_error: float) -> HeadKind:
    """What the outputs (images, units) are: as the row says, else by their values.

    Raises NetworkIncompatible where they contradict the row, or may be either.
    """
    name, kind, is_single = row.name, row.head.kind, outputs.shape[1] == 1
    low, high = float(outputs.min()), float(outputs.max())
    is_unit = low >= -ROUNDING and high <= 1 + ROUNDING
    if kind == "probabilities" and not is_unit:
        message = (
            f"The head of {name} is declared as probabilities, but it returns {low:.4g} to {high:.4g} for "
            f"sample images. Please {DECLARE}."
        )
        raise NetworkIncompatible(message)
    if kind == "softmax" and is_single:
        message = f"{name} returns one number for an image: its head is sigmoid or probabilities."
        raise NetworkIncompatible(message)
    if kind:
        return kind
    if is_single:
        message = (
            f"{name} returns one number for an image ({low:.4g} to {high:.4g} for sample images): that may "
            f"be the score of class 1, its probability, or a quantity, which is no class. Please {DECLARE}."
        )
        raise NetworkIncompatible(message)
    if not is_unit:
        return "softmax"
    if float(np.abs(outputs.sum(axis=1) - 1).max()) <= sum_error:
        return "probabilities"
    message = (
        f"The outputs of {name} lie between 0 and 1 ({low:.3g} to {high:.3g} for sample images), and do not "
        f"sum to 1: they may be probabilities, or scores that are small. Please {DECLARE}."
    )
    raise NetworkIncompatible(message)
