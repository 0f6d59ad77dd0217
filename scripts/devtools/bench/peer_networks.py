"""VGG16 and Xception as Keras has them, in torch: for the libraries that explain torch modules.

`Weights` gives the arrays as `peer_ours.named_weights` names them. Outputs are logits.
"""

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Weights = dict[str, NDArray[np.float32]]
VGG16 = ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))  # blocks and their convolutions
EPSILON = 1e-3  # of Keras's batch normalisation in Xception


def build(network: str, weights: Weights) -> tuple[nn.Module, str]:
    """The network, ready to explain, and the name of its target layer: the last ReLU that has places."""
    model, layer = {"vgg16": vgg16, "xception": xception}[network](weights)
    return model.eval(), layer


def vgg16(weights: Weights) -> tuple[nn.Module, str]:
    """Input (n, 3, 224, 224)."""
    layers = OrderedDict[str, nn.Module]()
    for block, convolutions in VGG16:
        for number in range(1, convolutions + 1):
            name = f"block{block}_conv{number}"
            layers[name] = convolution(weights, name, padding=1)
            layers[f"{name}_relu"] = nn.ReLU()
        layers[f"block{block}_pool"] = nn.MaxPool2d(2, 2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = dense(weights, "fc1", positions=7 * 7)
    layers["fc1_relu"] = nn.ReLU()
    layers["fc2"] = dense(weights, "fc2")
    layers["fc2_relu"] = nn.ReLU()
    layers["predictions"] = dense(weights, "predictions")
    return nn.Sequential(layers), "block5_conv3_relu"


def xception(weights: Weights) -> tuple[nn.Module, str]:
    """Input (n, 3, 299, 299)."""
    layers = OrderedDict[str, nn.Module]()
    for number, stride in ((1, 2), (2, 1)):
        name = f"block1_conv{number}"
        layers[name] = convolution(weights, name, stride=stride)
        layers[f"{name}_bn"] = normalisation(weights, f"{name}_bn")
        layers[f"{name}_act"] = nn.ReLU()
    shortcuts = iter(range(1, 5))
    for block in (2, 3, 4, *range(5, 13), 13):
        whole = block in range(5, 13)  # keeps its size
        shortcut = None if whole else next(shortcuts)
        layers[f"block{block}"] = Block(weights, block, 3 if whole else 2, shortcut)
    for number in (1, 2):
        name = f"block14_sepconv{number}"
        layers[name] = separable(weights, name)
        layers[f"{name}_bn"] = normalisation(weights, f"{name}_bn")
        layers[f"{name}_act"] = nn.ReLU()
    layers["avg_pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["predictions"] = dense(weights, "predictions")
    return nn.Sequential(layers), "block14_sepconv2_act"


class Block(nn.Module):  # type: ignore[misc]  # torch is Any to whoever does not have it
    """One of Xception's blocks: separable convolutions beside a shortcut: a convolution, or nothing."""

    def __init__(self, weights: Weights, block: int, convolutions: int, shortcut: int | None) -> None:
        """`shortcut` is the number of its convolution; with one, the block halves the size."""
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(1, convolutions + 1):
            name = f"block{block}_sepconv{number}"
            if (block, number) != (2, 1):
                layers.append(nn.ReLU())
            layers += [separable(weights, name), normalisation(weights, f"{name}_bn")]
        self.shortcut: nn.Module = nn.Identity()
        if shortcut is not None:
            # Keras pads an even size on the far side alone, an odd one on both: so does rounding up.
            layers.append(Shrink())
            self.shortcut = nn.Sequential(
                convolution(weights, f"conv2d-{shortcut}", stride=2),
                normalisation(weights, f"batch_normalization-{shortcut}"),
            )
        self.straight = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return torch.add(self.straight(x), self.shortcut(x))


class Shrink(nn.Module):  # type: ignore[misc]
    """Maximum over 3x3 at every second place, padded as TensorFlow's "same" pads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An even size is padded behind, an odd one on both sides."""
        odd = x.shape[-1] % 2
        return nn.functional.max_pool2d(x, 3, 2, padding=odd, ceil_mode=not odd)


def convolution(weights: Weights, name: str, *, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """An ordinary convolution, with a bias where there is one."""
    kernel = tensor(weights[f"{name}/kernel"].transpose(3, 2, 0, 1))
    bias = weights.get(f"{name}/bias")
    outputs, inputs, size, _ = kernel.shape
    made = nn.Conv2d(inputs, outputs, size, stride, padding, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(kernel)
    made.bias = None if bias is None else nn.Parameter(tensor(bias))
    return made


def separable(weights: Weights, name: str) -> nn.Module:
    """A 3x3 convolution of each channel by itself, then one of 1x1 over all."""
    depthwise = tensor(weights[f"{name}/depthwise_kernel"].transpose(2, 3, 0, 1))
    pointwise = tensor(weights[f"{name}/pointwise_kernel"].transpose(3, 2, 0, 1))
    outputs, inputs = pointwise.shape[:2]
    first = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False, device="meta")
    second = nn.Conv2d(inputs, outputs, 1, bias=False, device="meta")
    first.weight, second.weight = nn.Parameter(depthwise), nn.Parameter(pointwise)
    return nn.Sequential(first, second)


def normalisation(weights: Weights, name: str) -> nn.BatchNorm2d:
    """Batch normalisation by the moving averages."""
    gamma = tensor(weights[f"{name}/gamma"])
    made = nn.BatchNorm2d(len(gamma), eps=EPSILON)
    made.weight, made.bias = nn.Parameter(gamma), nn.Parameter(tensor(weights[f"{name}/beta"]))
    made.running_mean = tensor(weights[f"{name}/moving_mean"])
    made.running_var = tensor(weights[f"{name}/moving_variance"])
    return made


def dense(weights: Weights, name: str, *, positions: int = 1) -> nn.Linear:
    """A dense layer; behind a flattened map of so many positions, whose channels stand first here."""
    kernel = weights[f"{name}/kernel"]
    outputs = kernel.shape[1]
    turned = kernel.reshape(positions, -1, outputs).transpose(1, 0, 2).reshape(-1, outputs)
    made = nn.Linear(len(turned), outputs, device="meta")
    made.weight, made.bias = nn.Parameter(tensor(turned.T)), nn.Parameter(tensor(weights[f"{name}/bias"]))
    return made


def tensor(array: NDArray[np.float32]) -> torch.Tensor:
    """A tensor of its own."""
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
