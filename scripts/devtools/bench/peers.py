"""The same work in other libraries: the top 8 classes of one image and of eight, from the same layer of the
same network with the same weights. Each runs in a process of its own and has the machine to itself when it is
its turn; each is used in the fastest way that its documentation shows, is given preprocessed images and is
told the classes, which ours does and finds itself. A library is compared only where its maps, scaled to
[0, 1], are ours.
"""
# They run in an environment of their own, made from peers.txt, in which this module serves one of them: until
# one is chosen, it imports NumPy and the standard library alone.

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devtools import import_path
from devtools.bench.report import Figures, Requirement, by_figure, plain, table, tiny, versions
from devtools.bench.timing import clock
from devtools.environments import Environment, fingerprint

TITLE = "Other libraries"
PACKAGES = ("tensorflow", "keras", "numpy")
NETWORKS = {"vgg16": ("VGG16", "block5_conv3"), "xception": ("Xception", "block14_sepconv2_act")}
OURS = "ours"
CLASSES, IMAGES = 8, 8
BATCHES = (1, 8)  # images
ROUNDS = 5
PATIENCE_S = 5.0  # what takes longer is measured once: it is tens of times slower
TOLERANCE = 1e-4  # between maps scaled to [0, 1]; float32, summed in another order, differs by some 1e-6
PAIRS = 8  # pairs of image and class in one call, for libraries that take one class an image
SEED = 0
PINS = Path(__file__).with_name("peers.txt")

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
# Prepared images (n, height, width, 3), classes of each (n, k) -> maps (n, k, rows, columns)
Explain = Callable[[Floats, Ids], Floats]
# How to explain; and maps as large as the target layer's -> as large as `Explain` gives them
Library = tuple[Explain, Callable[[Floats], Any]]


class Failed(Exception):
    """A library said that it cannot; the message is its own."""


class Process:
    """A library loaded with a network in a process of its own, waiting for its turn."""

    def __init__(self, command: list[str]) -> None:
        """Start it; it is ready once `answer` has been read."""
        quiet = {**os.environ, **import_path(), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=quiet
        )

    def answer(self) -> dict[str, Any]:
        """Return its next line. Raises Failed with its error, or with the end of its log."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        found: dict[str, Any] = json.loads(line) if line else {"error": self._reason()}
        if "error" in found:
            raise Failed(found["error"])
        return found

    def ask(self, images: int, classes: int, *, compare: bool = False) -> dict[str, Any]:
        """Let it explain, and wait until it has. Raises Failed."""
        try:
            print(json.dumps([images, classes, compare]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._reason()) from None
        return self.answer()

    def _reason(self) -> str:
        self._log.seek(0)
        said = [line for line in self._log.read().split("\n") if line.strip()]
        return f"ended with {self._process.wait()}: {said[-1] if said else 'without a word'}"

    def close(self) -> None:
        """End it."""
        with self._process as ending:
            ending.kill()
        self._log.close()


class Comparison:
    """The libraries with one network, and what they took."""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}
        self.took: dict[
            str, dict[str, list[tuple[float, float]]]
        ] = {}  # batch, library: wall and CPU seconds
        self.agreement: dict[str, dict[str, float]] = {}  # the worst over all batch sizes
        self.failed: dict[str, str] = {}  # library -> why it was not measured to the end

    def attempt(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a library answers; nothing where it fails: the others go on. Raises Failed if it is ours."""
        try:
            return do()
        except Failed as error:
            if name == OURS:
                raise
            self.failed[name] = str(error)
            self.processes.pop(name, None)
            return {}

    def ask(self, name: str, batch: int, classes: int, *, compare: bool = False) -> dict[str, Any]:
        """Let a library explain, as `attempt`."""
        process = self.processes[name]
        return self.attempt(name, lambda: process.ask(batch, classes, compare=compare))

    def take_turns(self, batch: int, rounds: int) -> None:
        """Each once a round, every other one backwards; the slow ones once. The first compares maps."""
        for name in list(self.processes):
            for classes in (1, CLASSES) if name == OURS else (1,):  # traces, and fills the caches
                self.ask(name, batch, classes)
        took = self.took[str(batch)] = {name: [] for name in self.processes}
        for turn in range(rounds):
            order = list(self.processes)
            for name in order if turn % 2 == 0 else reversed(order):
                if turn and took[name][0][0] > PATIENCE_S:
                    continue
                if found := self.ask(name, batch, CLASSES, compare=turn == 0):
                    took[name].append((found["wall"], found["cpu"]))
                    same = found.get("same")
                    if same and same["difference"] >= self.agreement.get(name, same)["difference"]:
                        self.agreement[name] = same
        self.took[str(batch)] = {name: took[name] for name in self.processes}

    def figures(self) -> dict[str, Any]:
        """Ratios within this run, and who is not comparable."""
        comparable = [
            name
            for name, same in self.agreement.items()
            if name not in self.failed and same["lit"] and same["difference"] <= TOLERANCE
        ]
        medians = {
            batch: {
                name: {"wall": median(w for w, _ in runs), "cpu": median(c for _, c in runs)}
                for name, runs in by_name.items()
            }
            for batch, by_name in self.took.items()
        }
        return {
            "times_peer": {
                batch: {name: {key: by[name][key] / by[OURS][key] for key in by[name]} for name in comparable}
                for batch, by in medians.items()
            },
            "images_per_s": {
                batch: {name: int(batch) / one["wall"] for name, one in by.items()}
                for batch, by in medians.items()
            },
            "repeats": {
                batch: {name: len(runs) for name, runs in by.items()} for batch, by in self.took.items()
            },
            "agreement": self.agreement,
            "not_comparable": sorted({*self.agreement} - {*comparable} - {*self.failed}),
            "failed": self.failed,
        }


def compare(
    network: str, commands: Mapping[str, list[str]], batches: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Load one network in every library, then let them take turns. Raises Failed where ours does not run."""
    found = Comparison()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        # One after the other, two cores being few; ours first, since it leaves behind what the others need.
        for name, command in commands.items():
            process = found.processes[name] = Process([*command, network, folder])
            stack.callback(process.close)
            found.attempt(name, process.answer)
        for batch in batches:
            found.take_turns(batch, rounds)
    return found.figures()


def measure(*, quick: bool) -> dict[str, Any]:
    """Make the environment where there is none, then compare one network after the other."""
    named = os.environ.get("BENCH_PEERS")  # no GRADCAM_: those are settings of the worker
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else cache / "gradcam-worker" / "peers"
    missing, peers = install(folder, tuple(PEERS)), [sys.executable, str(folder / "bin" / "python")]
    commands = {
        name: [peers[name != OURS], "-P", "-m", "devtools.bench.peers", name]
        for name in LIBRARIES
        if name not in missing
    }
    by_network = {}
    for network in NETWORKS:
        print(f"{network} ...", flush=True)
        by_network[network] = compare(
            network, commands, BATCHES[:1] if quick else BATCHES, 2 if quick else ROUNDS
        )
    pins = {name: pin.partition("==")[2] for name, pin in pinned().items()}
    return {
        **by_figure(by_network),
        "not_installed": missing,
        "classes": CLASSES,
        "versions": versions(PACKAGES) | {name: pins[name] for name in ("torch", *PEERS)},
    }


def requirements(found: Figures) -> Iterator[Requirement]:
    """Ahead of each library, at its best, in wall and in CPU time."""
    for network, by_batch in found["times_peer"].items():
        for batch, peers in by_batch.items():
            ratios = {peer: min(both.values()) for peer, both in peers.items()}
            closest = min(ratios, key=lambda peer: ratios[peer], default="none could be compared")
            least = ratios.get(closest, 0.0)
            what = f"{network}: faster than any other library, batch {batch} (the closest: {closest})"
            yield Requirement(what, "more than 1 times", f"{plain(least)} times", least > 1)


def tables(found: Figures) -> Iterator[str]:
    """Speeds and ratios, agreement, and who is not in the comparison."""
    rows = []
    for network, by_batch in found["images_per_s"].items():
        for batch, speeds in by_batch.items():
            for name, speed in speeds.items():
                ahead = found["times_peer"][network][batch].get(name)
                same = found["agreement"][network].get(name)
                ratios = (plain(ahead["wall"]), plain(ahead["cpu"])) if ahead else ("", "")
                rows.append(
                    (network, batch, name, plain(speed), *ratios, tiny(same["difference"]) if same else "")
                )
    headings = ("network", "batch", "library", "images/s", "ours faster by, wall", "CPU", "maps differ by")
    yield from table(headings, rows)
    left_out = [f"{peer} cannot be installed here: {why}." for peer, why in found["not_installed"].items()]
    for network, failed in found["failed"].items():
        left_out += [f"{peer} does not run here, with {network}: {why}." for peer, why in failed.items()]
    for network, peers in found["not_comparable"].items():
        left_out += [f"{peer} gives other maps than ours, with {network}: not compared." for peer in peers]
    yield from left_out or ["All five install, run and agree."]
    yield ""


# The environment.


def pinned() -> dict[str, str]:
    """Package -> how peers.txt pins it."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0]: line for line in lines if line and not line.startswith("#")}


def install(folder: Path, peers: tuple[str, ...]) -> dict[str, str]:
    """Make the environment with what is not there yet; peer -> why it could not be installed."""
    environment, pins, wanted = Environment(folder), pinned(), fingerprint(PINS)
    have = environment.stamp
    if have[:1] != [wanted]:
        print(f"Making the environment {folder}: some minutes, about 1.5 GB of downloads.", file=sys.stderr)
        environment.create()
        failed = environment.pip("--no-deps", *(pin for name, pin in pins.items() if name not in peers))
        # Where only a torch for GPUs is available, it does not start without their libraries.
        imported = [str(environment.python), "-c", "import torch"]
        if not failed and subprocess.run(imported, capture_output=True, check=False).returncode:
            failed = environment.pip(pins["torch"])
        if failed:
            return dict.fromkeys(peers, failed)
        have = [wanted]
    found = {peer: environment.pip("--no-deps", pins[peer]) for peer in peers if peer not in have}
    missing = {peer: why for peer, why in found.items() if why}
    environment.keep(*have, *(found.keys() - missing.keys()))
    return missing


# What runs in the process of a library.


def serve(libraries: Mapping[str, Callable[[str, Path], Library]]) -> None:
    """Load what the command line names (library, network, folder) and explain until the input ends.

    A line in: how many images, how many classes, whether maps are compared. A line out: seconds, or an error.
    """
    name, network, place = sys.argv[1:]
    folder = Path(place)
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print goes elsewhere
    os.dup2(2, 1)
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        explain, enlarge = libraries[name](network, folder)
        loaded[:] = [explain, enlarge, np.load(folder / "images.npy"), np.load(folder / "class_ids.npy")]
        return {"ready": name}

    def explain(count: int, classes: int, wants_comparison: bool) -> dict[str, Any]:
        library, enlarge, images, class_ids = loaded
        maps: list[Floats] = []
        wall, cpu = clock(lambda: maps.append(library(images[:count], class_ids[:count, :classes])))
        kept = folder / f"maps-{count}.npy"
        if wants_comparison and name == OURS:
            np.save(kept, maps[0])
        elif wants_comparison:
            return {"wall": wall, "cpu": cpu, "same": difference(maps[0], np.load(kept), enlarge)}
        return {"wall": wall, "cpu": cpu}

    def answered(do: Callable[..., dict[str, Any]], *given: Any) -> bool:
        try:
            answer = do(*given)
        except Exception as error:  # noqa: BLE001  # whatever a library may raise: the others go on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
        return "error" not in answer

    if answered(load):
        for line in sys.stdin:
            answered(explain, *json.loads(line))


def difference(theirs: Floats, ours: Floats, enlarge: Callable[[Floats], Any]) -> dict[str, float]:
    """The largest `difference` of maps, how many were `compared`, how many of ours are `lit`."""
    apart = np.abs(spread(theirs) - spread(enlarge(ours)))
    lit = int(np.count_nonzero(ours.max(axis=(2, 3))))
    return {"difference": float(apart.max()), "compared": ours.shape[0] * ours.shape[1], "lit": lit}


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
    from devtools.bench.engine import best, noise, prepared
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
        "Add": lambda _, one, other: torch.add(one, other),
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
                inputs = [outputs[one] for one in layer["inputs"]] or [x]
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
            extract(one, scores, retain_graph=left > 0)[0] for left, one in zip(lefts, columns, strict=True)
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
        return explainer(tensor(images), [ClassifierOutputTarget(int(one)) for one in class_ids])

    return in_pairs(some), lambda maps: np.stack([scale_cam_image(one, size) for one in maps])


def captum(network: str, folder: Path) -> Library:
    """Forward and backward for each pair."""
    import torch
    from captum.attr import LayerGradCam

    model, target, tensor = in_torch(network, folder)
    explainer = LayerGradCam(model, target)

    def some(images: Floats, class_ids: Ids) -> Any:
        found = explainer.attribute(tensor(images), torch.from_numpy(class_ids), relu_attributions=True)
        return found[:, 0].detach().numpy()

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


def xplique(network: str, folder: Path) -> Library:
    """Forward and backward for each pair, traced; maps as large as the input."""
    import tensorflow as tf
    from xplique.attributions import GradCAM

    model, layer = in_keras(network, folder)
    one_hot, size = np.eye(model.output_shape[-1], dtype=np.float32), model.input_shape[1:3]
    explainer = GradCAM(model, conv_layer=layer.name, batch_size=None)

    def enlarge(maps: Floats) -> Any:
        flat = maps.reshape(-1, *maps.shape[2:], 1)
        large = tf.image.resize(flat, size, method=tf.image.ResizeMethod.BICUBIC)
        return np.asarray(large).reshape(*maps.shape[:2], *size)

    return in_pairs(lambda images, class_ids: explainer.explain(images, one_hot[class_ids])[..., 0]), enlarge


PEERS: dict[str, Callable[[str, Path], Library]] = {
    "torchcam": torchcam,
    "grad-cam": grad_cam,
    "captum": captum,
    "tf-keras-vis": tf_keras_vis,
    "xplique": xplique,
}
LIBRARIES = {OURS: ours, **PEERS}

if __name__ == "__main__":
    serve(LIBRARIES)
