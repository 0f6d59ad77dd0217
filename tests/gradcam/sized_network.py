"""TinyNetwork with images brought to its input in another way."""

from dataclasses import replace

from gradcam_worker.gradcam.sizing import Sizing
from gradcam_worker.testing import TinyNetwork


class SizedNetwork(TinyNetwork):
    """TinyNetwork with a sizing of its own."""

    def __init__(self, sizing: Sizing) -> None:
        self.facts = replace(TinyNetwork.facts, sizing=sizing)
