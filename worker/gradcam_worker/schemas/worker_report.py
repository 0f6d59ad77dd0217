"""What live workers say of themselves: who they are, and which networks they offer."""

from typing import Annotated

from pydantic import AwareDatetime, Field

from gradcam_worker.schemas.model import ResponseModel


class NetworkOffer(ResponseModel):
    """A network that live workers offer: one of the catalog whose weights they have, or an operator's own."""

    name: str
    """what a job names"""
    input_size: tuple[int, int]
    """height and width of its input, in pixels"""
    layer: str | None = None
    """the target layer; none: found in the network when it is loaded"""
    classes: int | None = None
    """number of classes; none: known when it is loaded"""
    imagenet: bool = False
    """whether its classes are those of ImageNet"""
    labels: tuple[str, ...] = ()
    """names of the classes, where they are few and not ImageNet's"""
    inputs: tuple[str, ...] = ()
    """what it takes beside the image"""
    scores_only: bool = False
    """whether the methods rise and occlusion alone explain it"""
    workers: int = 0
    """how many live workers offer it"""


class WorkerReport(ResponseModel):
    """A live worker process. Workers of earlier versions report no version and no networks."""

    id: str
    """its name: host, a random part, process id"""
    device: str = ""
    """what it computes on"""
    since: AwareDatetime | None = None
    """when it started"""
    running: Annotated[int, Field(ge=0)] = 0
    """jobs that it runs"""
    batch: float = 0
    """images in a batch, as a moving average"""
    trouble: str | None = None
    """why it takes no jobs just now, for operators; none: it takes jobs"""
    version: str | None = None
    """its version of this package"""
    networks: tuple[str, ...] = ()
    """names of the networks that it offers"""


class OfferedNetworks(ResponseModel):
    """The networks in a worker's health report, which is written every few seconds: it is kept small."""

    catalog: tuple[str, ...] = ()
    """names of those of the catalog whose weights are on the worker's machine"""
    own: tuple[NetworkOffer, ...] = ()
    """the operator's"""
