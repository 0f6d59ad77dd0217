"""The TensorFlow libraries of `bench peers`, each as its documentation shows."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded

import keras
import numpy as np
import tensorflow as tf

from devtools.bench.peer_serve import Floats, Ids, Work, in_pairs, serve

BUILDERS = {"vgg16": ("VGG16", "block5_conv3"), "xception": ("Xception", "block14_sepconv2_act")}


def loaded(work: Work) -> tuple[Any, Any]:
    """The network with logits as its outputs, and its target layer."""
    builder, layer = BUILDERS[work.network]
    model = getattr(keras.applications, builder)(weights=None, classifier_activation=None)
    model.set_weights(list(work.weights().values()))
    return model, model.get_layer(layer)


class KerasVis:
    """The package tf-keras-vis: forward and backward for each pair."""

    def __init__(self, work: Work) -> None:
        """Load."""
        from tf_keras_vis.gradcam import Gradcam
        from tf_keras_vis.utils.scores import CategoricalScore

        model, self._layer = loaded(work)
        self._cam, self._score = Gradcam(model, clone=False), CategoricalScore

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """See `peer_serve.Way`."""
        return in_pairs(self._some, images, class_ids)

    def _some(self, images: Floats, class_ids: Ids) -> Any:
        return self._cam(
            self._score(class_ids.tolist()),
            images,
            penultimate_layer=self._layer,
            seek_penultimate_conv_layer=False,
            expand_cam=False,
            normalize_cam=False,
        )

    def enlarged(self, maps: Floats) -> Floats:
        """See `peer_serve.Way`: its maps are as large as the layer's, as asked for."""
        return maps


class Xplique:
    """The package xplique: forward and backward for each pair, traced; maps as large as the input."""

    def __init__(self, work: Work) -> None:
        """Load."""
        from xplique.attributions import GradCAM

        model, layer = loaded(work)
        self._classes = model.output_shape[-1]
        self._size = work.images.shape[1:3]
        self._cam = GradCAM(model, conv_layer=layer.name, batch_size=None)

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """See `peer_serve.Way`."""
        return in_pairs(self._some, images, class_ids)

    def _some(self, images: Floats, class_ids: Ids) -> Any:
        return self._cam.explain(images, np.eye(self._classes, dtype=np.float32)[class_ids])[..., 0]

    def enlarged(self, maps: Floats) -> Floats:
        """See `peer_serve.Way`."""
        flat = maps.reshape(-1, *maps.shape[2:], 1)
        large = tf.image.resize(flat, self._size, method=tf.image.ResizeMethod.BICUBIC)
        return np.asarray(large).reshape(*maps.shape[:2], *self._size)


LIBRARIES: dict[str, Any] = {"tf-keras-vis": KerasVis, "xplique": Xplique}

if __name__ == "__main__":
    serve(LIBRARIES)
