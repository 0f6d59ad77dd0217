"""Other libraries as `peers` compares them, and ours: each serves in a process of its own.

    python -m devtools.bench.peer_libraries LIBRARY NETWORK FOLDER

The others run in an environment of their own, made from peers.txt: until one is chosen, this module imports
NumPy and the standard library alone. Ours runs first and leaves in FOLDER what the others need: images,
classes, weights and layers.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools.bench.timing import clock

OURS = "ours"
NETWORKS = {"vgg16": ("VGG16", "block5_conv3"), "xception": ("Xception", "block14_sepconv2_act")}
CLASSES, IMAGES = 8, 8
PAIRS = 8  # pairs of image and class in one call, for libraries that take one class an image
SEED = 0

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
# Prepared images (n, height, width, 3), classes of each (n, k) -> maps (n, k, rows, columns)
Explain = Callable[[Floats, Ids], Floats]
# How to explain; and maps as large as the target layer's -> as large as `Explain` gives them
Library = tuple[Explain, Callable[[Floats], Any]]


def serve(libraries: Mapping[str, Callable[[str, Path], Library]]) -> None:
    """Load what the command line names (library, network, folder) and explain until the input ends.

    A line in: how many images, how many classes. A line out: seconds and how far the maps are from ours, or
    an error.
    """
    name, network, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print goes elsewhere
    os.dup2(2, 1)
    try:
        explain, enlarge = libraries[name](network, folder)
        images, class_ids = np.load(folder / "images.npy"), np.load(folder / "class_ids.npy")
        print(json.dumps({"loaded": name}), file=answers)
        for line in sys.stdin:
            count, classes = json.loads(line)
            maps: list[Floats] = []
            wall, cpu = clock(lambda: maps.append(explain(images[:count], class_ids[:count, :classes])))  # noqa: B023  # called at once
            kept = folder / f"maps-{count}-{classes}.npy"
            if name == OURS:
                np.save(kept, maps[0])
            answer = {"wall": wall, "cpu": cpu, **difference(maps[0], np.load(kept), enlarge)}
            print(json.dumps(answer), file=answers)
    except Exception as error:  # noqa: BLE001  # whatever a library may raise: the others go on
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


def difference(theirs: Floats, ours: Floats, enlarge: Callable[[Floats], Any]) -> dict[str, float]:
    """The largest `difference` of maps, and how many of ours are `lit`."""
    apart = np.abs(spread(theirs) - spread(enlarge(ours)))
    lit = int(np.count_nonzero(ours.max(axis=(2, 3))))
    return {"difference": float(apart.max()), "lit": lit}


def spread(maps: Floats) -> NDArray[np.float64]:
    """Maps (..., rows, columns) -> each from 0 at its least to 1 at its peak: some libraries scale so."""
    exact = np.asarray(maps, np.float64)
    least, peak = (function(exact, axis=(-2, -1), keepdims=True) for function in (np.min, np.max))
    apart = peak - least
    return np.asarray((exact - least) / np.where(apart > 0, apart, 1))


def in_pairs(explain: Callable[[Floats, Ids], Any]) -> Explain:
    """Every class of every image, with a library that explains one class an image: some pairs a call."""

    def all_classes(images: Floats, class_ids: Ids) -> Floats:
        count, classes = class_ids.shape
        repeated, wanted = np.repeat(np.arange(count), classes), class_ids.reshape(-1)
        parts = [
            np.asarray(explain(images[repeated[first : first + PAIRS]], wanted[first : first + PAIRS]))
            for first in range(0, len(wanted), PAIRS)
        ]
        together = np.concatenate(parts)
        return together.reshape(count, classes, *together.shape[1:])

    return all_classes


def same_size(maps: Floats) -> Floats:
    """Of a library whose maps are as large as the layer's."""
    return maps


def ours(network: str, folder: Path) -> Library:
    """The engine, given pixels. It writes what the others need: weights, layers, images, classes."""
    from devtools.bench.variants import best, noise, prepared
    from gradcam_worker.gradcam.methods import cam
    from gradcam_worker.gradcam.models.loading import load_network

    loaded = load_network(network, random_seed=SEED)
    pixels, model = noise(IMAGES, loaded.facts.input_size), loaded._model  # noqa: SLF001  # the same weights for all
    np.save(folder / "images.npy", prepared(loaded, pixels))
    class_ids = np.argsort(-loaded.scores(pixels), axis=1)[:, :CLASSES].astype(np.int64)
    np.save(folder / "class_ids.npy", class_ids)
    np.savez(folder / "weights.npz", *model.get_weights())
    layers = [
        {
            "name": layer.name,
            "kind": type(layer).__name__,
            "inputs": [one.operation.name for one in layer._inbound_nodes[0].parent_nodes],  # noqa: SLF001
            "weights": len(layer.weights),
            "relu": getattr(getattr(layer, "activation", None), "__name__", "") == "relu",
            **{key: layer.get_config().get(key) for key in ("strides", "padding", "pool_size", "epsilon")},
        }
        for layer in model.layers
    ]
    (folder / "layers.json").write_text(json.dumps(layers))

    def explain(images: Floats, class_ids: Ids) -> Floats:
        computed = loaded.compute(pixels[: len(images)], best(*class_ids.shape))
        return np.stack([cam.heatmaps(raw) for raw in computed.raw])

    return explain, same_size


def saved_weights(folder: Path) -> list[Floats]:
    """The arrays as Keras keeps them, in the model's order."""
    with np.load(folder / "weights.npz") as saved:
        return [saved[name] for name in saved.files]


def in_keras(network: str, folder: Path) -> tuple[Any, Any]:
    """The network with logits as its outputs, and its target layer."""
    import keras

    builder, layer = NETWORKS[network]
    model = getattr(keras.applications, builder)(weights=None, classifier_activation=None)
    model.set_weights(saved_weights(folder))
    return model, model.get_layer(layer)


def in_torch(network: str, folder: Path) -> tuple[Any, Any, Callable[[Floats], Any]]:
    """The network with logits, its target module, and how images become its input.

    Channels last in memory, which is faster on a CPU.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    def convolution(layer: dict[str, Any], x: Any, kernel: Any, bias: Any = None) -> Any:
        padding = kernel.shape[-1] // 2 if layer["padding"] == "same" else 0
        return functional.conv2d(x, kernel, bias, layer["strides"][0], padding)

    def separable(_: dict[str, Any], x: Any, depthwise: Any, pointwise: Any) -> Any:
        return functional.conv2d(functional.conv2d(x, depthwise, padding=1, groups=len(depthwise)), pointwise)

    def pool(layer: dict[str, Any], x: Any) -> Any:
        # Keras pads an even size on the far side alone, an odd one on both: so does rounding up.
        same = layer["padding"] == "same"
        odd = x.shape[-1] % 2 if same else 0
        sizes = layer["pool_size"][0], layer["strides"][0]
        return functional.max_pool2d(x, *sizes, padding=odd, ceil_mode=same and not odd)

    kinds: dict[str, Callable[..., Any]] = {
        "Conv2D": convolution,
        "SeparableConv2D": separable,
        "BatchNormalization": lambda layer, x, gamma, beta, mean, variance: functional.batch_norm(
            x, mean.detach(), variance.detach(), gamma, beta, eps=layer["epsilon"]
        ),
        "MaxPooling2D": pool,
        "GlobalAveragePooling2D": lambda _, x: x.mean((2, 3)),
        "Flatten": lambda _, x: x.permute(0, 2, 3, 1).flatten(1),
        "Dense": lambda _, x, kernel, bias: torch.addmm(bias, x, kernel),
        "Add": lambda _, left, right: torch.add(left, right),
    }

    class Graph(nn.Module):  # type: ignore[misc]  # torch is Any where it is not installed
        """The layers in Keras's order, each with the outputs of those that it names."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = json.loads((folder / "layers.json").read_text())
            self.target, arrays = nn.Identity(), iter(saved_weights(folder))
            for layer in self.layers:
                for number in range(layer["weights"]):
                    array = next(arrays)
                    if array.ndim == 4:  # noqa: PLR2004  # height, width, channels in and out
                        depthwise = layer["kind"] == "SeparableConv2D" and not number
                        array = array.transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
                    parameter = nn.Parameter(torch.from_numpy(np.ascontiguousarray(array)))
                    self.register_parameter(f"{layer['name']}-{number}", parameter)

        def forward(self, x: Any) -> Any:
            outputs: dict[str, Any] = {}
            for layer in self.layers:
                name = layer["name"]
                inputs = [outputs[source] for source in layer["inputs"]] or [x]
                weights = [self.get_parameter(f"{name}-{number}") for number in range(layer["weights"])]
                x = kinds[layer["kind"]](layer, *inputs, *weights) if layer["kind"] in kinds else inputs[0]
                x = functional.relu(x) if layer["relu"] else x
                outputs[name] = x = self.target(x) if name == NETWORKS[network][1] else x
            return x

    model = Graph().eval().to(memory_format=torch.channels_last)
    return model, model.target, lambda images: torch.from_numpy(images).permute(0, 3, 1, 2)


def torchcam(network: str, folder: Path) -> Library:
    """One forward pass, then one backward pass a class, for all images at once."""
    import torch
    from torchcam.methods import GradCAM

    model, target, tensor = in_torch(network, folder)
    extract = GradCAM(model, target)

    def explain(images: Floats, class_ids: Ids) -> Floats:
        scores, columns = model(tensor(images)), class_ids.T.tolist()
        lefts = reversed(range(len(columns)))
        maps = [
            extract(ids, scores, retain_graph=left > 0)[0] for left, ids in zip(lefts, columns, strict=True)
        ]
        return np.asarray(torch.stack(maps, dim=1))

    return explain, same_size


def grad_cam(network: str, folder: Path) -> Library:
    """Both passes for each pair; maps as large as the images."""
    # It imports names of torchvision for functions that are not used here; as registries have it, torchvision
    # cannot be imported beside a torch without CUDA.
    wanted = {
        "": (),
        ".transforms": ("Compose", "Normalize", "ToTensor"),
        ".transforms.functional": ("resize",),
    }
    for path, names in wanted.items():
        module = ModuleType(f"torchvision{path}")
        vars(module).update(dict.fromkeys(names))
        sys.modules[module.__name__] = module
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, target, tensor = in_torch(network, folder)
    explainer, size = GradCAM(model, [target]), np.load(folder / "images.npy").shape[2:0:-1]  # width, height

    def some(images: Floats, class_ids: Ids) -> Any:
        return explainer(tensor(images), [ClassifierOutputTarget(int(class_id)) for class_id in class_ids])

    return in_pairs(some), lambda maps: np.stack([scale_cam_image(image_maps, size) for image_maps in maps])


def captum(network: str, folder: Path) -> Library:
    """Forward and backward for each pair."""
    import torch
    from captum.attr import LayerGradCam

    model, target, tensor = in_torch(network, folder)
    explainer = LayerGradCam(model, target)

    def some(images: Floats, class_ids: Ids) -> Any:
        attributions = explainer.attribute(
            tensor(images), torch.from_numpy(class_ids), relu_attributions=True
        )
        return attributions[:, 0].detach().numpy()

    return in_pairs(some), same_size


def tf_keras_vis(network: str, folder: Path) -> Library:
    """Forward and backward for each pair."""
    from tf_keras_vis.gradcam import Gradcam
    from tf_keras_vis.utils.scores import CategoricalScore

    model, layer = in_keras(network, folder)
    explainer = Gradcam(model, clone=False)
    plainly = {"seek_penultimate_conv_layer": False, "expand_cam": False, "normalize_cam": False}

    def some(images: Floats, class_ids: Ids) -> Any:
        score = CategoricalScore(class_ids.tolist())
        return explainer(score, images, penultimate_layer=layer, **plainly)

    return in_pairs(some), same_size


LIBRARIES = {
    OURS: ours,
    "torchcam": torchcam,
    "grad-cam": grad_cam,
    "captum": captum,
    "tf-keras-vis": tf_keras_vis,
}

if __name__ == "__main__":
    serve(LIBRARIES)
