"""The torch libraries of `bench peers`, each as its documentation shows."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch

from devtools.bench.peer_networks import build
from devtools.bench.peer_serve import Floats, Ids, Work, in_pairs, serve


def loaded(work: Work) -> tuple[Any, Any]:
    """The network and the module that is its target layer; channels last, which is faster on a CPU."""
    model, layer = build(work.network, work.weights())
    return model.to(memory_format=torch.channels_last), model.get_submodule(layer)


def tensor(images: Floats) -> torch.Tensor:
    """Images (n, height, width, 3) -> (n, 3, height, width), as they lie in memory: channels last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class TorchCam:
    """The package torchcam: one forward pass, then one backward pass a class, for all images at once."""

    def __init__(self, work: Work) -> None:
        """Load."""
        from torchcam.methods import GradCAM

        self._model, target = loaded(work)
        self._extract = GradCAM(self._model, target)

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """See `peer_serve.Way`."""
        scores = self._model(tensor(images))
        columns = class_ids.T.tolist()
        maps = [
            self._extract(column, scores, retain_graph=left > 0)[0]
            for left, column in zip(reversed(range(len(columns))), columns, strict=True)
        ]
        return np.asarray(torch.stack(maps, dim=1))

    def enlarged(self, maps: Floats) -> Floats:
        """See `peer_serve.Way`: its maps are as large as the layer's."""
        return maps


class GradCam:
    """The package grad-cam (pytorch_grad_cam): both passes for each pair; maps as large as the images."""

    def __init__(self, work: Work) -> None:
        """Load."""
        stand_in_for_torchvision()
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import scale_cam_image
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        model, target = loaded(work)
        self._cam, self._target = GradCAM(model, [target]), ClassifierOutputTarget
        self._scale = scale_cam_image
        self._size = work.images.shape[2:0:-1]  # width, height

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """See `peer_serve.Way`."""
        return in_pairs(self._some, images, class_ids)

    def _some(self, images: Floats, class_ids: Ids) -> Any:
        return self._cam(tensor(images), [self._target(int(one)) for one in class_ids])

    def enlarged(self, maps: Floats) -> Floats:
        """See `peer_serve.Way`."""
        return np.stack([self._scale(one, self._size) for one in maps])


class Captum:
    """The package captum: forward and backward for each pair."""

    def __init__(self, work: Work) -> None:
        """Load."""
        from captum.attr import LayerGradCam

        self._cam = LayerGradCam(*loaded(work))

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """See `peer_serve.Way`."""
        return in_pairs(self._some, images, class_ids)

    def _some(self, images: Floats, class_ids: Ids) -> Any:
        found = self._cam.attribute(tensor(images), torch.from_numpy(class_ids), relu_attributions=True)
        return found[:, 0].detach().numpy()

    def enlarged(self, maps: Floats) -> Floats:
        """See `peer_serve.Way`: its maps are as large as the layer's."""
        return maps


def stand_in_for_torchvision() -> None:
    """Give grad-cam the names of torchvision that it imports, for functions that are not used here.

    As registries have it, torchvision cannot be imported beside a torch without CUDA.
    """
    wanted = {
        "": (),
        ".transforms": ("Compose", "Normalize", "ToTensor"),
        ".transforms.functional": ("resize",),
    }
    for path, names in wanted.items():
        module = ModuleType(f"torchvision{path}")
        vars(module).update(dict.fromkeys(names))
        sys.modules[module.__name__] = module


LIBRARIES: dict[str, Any] = {"torchcam": TorchCam, "grad-cam": GradCam, "captum": Captum}

if __name__ == "__main__":
    serve(LIBRARIES)
