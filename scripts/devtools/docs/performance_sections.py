"""What the page says about each bench: why it is measured, what is required, and its tables."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from devtools.docs import performance_library as library
from devtools.docs import performance_worker as worker
from devtools.docs.performance_figures import Figures, Target


@dataclass(frozen=True)
class Section:
    """One bench on the page."""

    title: str
    about: str  # what is measured and how, for someone who has never heard of it
    targets: Callable[[Figures], Iterator[Target]]
    tables: Callable[[Figures], Iterator[str]]
    plots: Mapping[str, str]  # file -> what it shows
    absent: str = "It has not been run yet."


def nothing(_: Figures) -> Iterator[Target]:
    """Nothing is required."""
    return iter(())


SECTIONS: dict[str, Section] = {
    "engine": Section(
        "Engine",
        "What explaining costs beside predicting. *Share of forward* is the CPU time of the forward pass "
        "alone, divided by that of the forward pass with the explanations of the best 1, 8 or 50 classes: "
        "1.00 would be explanations for free. *The notebook's way* is the arithmetic that this project "
        "started from: eager, one class after the other, the whole trunk again for each. Weights are "
        "random, but seeded: speed does not depend on what they are. Before the clock starts, both ways "
        "have to give the same heatmaps.",
        library.engine_targets,
        library.engine_tables,
        {"share-of-forward.svg": "Share of the forward pass by number of classes, for VGG16 and Xception"},
    ),
    "peers": Section(
        "Other libraries",
        "The same work in other libraries: the top 8 classes of one image and of eight, from the same "
        "layer of the same network with the same weights. Each runs in a process of its own and has the "
        "machine to itself when it is its turn; each is used in the fastest way that its documentation "
        "shows, is given preprocessed images and is told the classes, which ours does and finds itself. A "
        "library is compared only where its maps, scaled to [0, 1], are ours.",
        library.peers_targets,
        library.peers_tables,
        {"others.svg": "How many times faster ours is than the notebook's way and than other libraries"},
    ),
    "host": Section(
        "Host",
        "What a job costs beside the network: decoding the photo, laying the heatmaps over it, encoding, "
        "checksums, the manifest. The floor is what the codecs alone take: one decode, and one encode for "
        "each overlay. One thread, default artifacts, a network and a store that cost nothing.",
        library.host_targets,
        library.host_tables,
        {},
    ),
    "service": Section(
        "Service",
        "Jobs per second through a real Valkey, a real S3 server and one worker, all on the same cores, "
        "against the engine alone on the same images at the batch sizes that the worker reached. With a "
        "stand-in network that takes no time: the ceiling of the machinery; with one that takes a GPU's "
        "time (25 ms for 32 images, without using a core): whether the device is kept busy.",
        worker.service_targets,
        worker.service_tables,
        {"service.svg": "Share of the engine's speed, and where a job's time goes"},
    ),
    "latency": Section(
        "Latency",
        "How long somebody waits who submits one job to a warm worker: everything but the pass itself, "
        "first with nothing else to do, then beside a saturating stream of bulk jobs.",
        worker.latency_targets,
        worker.latency_tables,
        {},
    ),
    "memory": Section(
        "Memory",
        "Ten thousand mixed jobs: every kind of artifact, several methods, large photos, broken images. "
        "Growth is from the second quarter of the jobs to the last.",
        worker.memory_targets,
        worker.memory_tables,
        {"memory.svg": "The worker's resident memory over time"},
    ),
    "threads": Section(
        "Threads",
        "How many threads to give to jobs and to TensorFlow on a CPU, so that they do not fight. Job "
        "threads decode, render and encode while one thread owns the device; *none* is the device thread "
        "alone.",
        nothing,
        worker.threads_tables,
        {},
    ),
    "backfill": Section(
        "Backfill",
        "`gradcam backfill` through real servers and a real worker. Speed: the same photos by the engine "
        "alone, in shards, and as single jobs. Rows: with a worker whose shards are done at once, what it "
        "costs to plan, hand out and follow so many. Kills: submitter and both workers, at random "
        "moments, and the backfill resumed each time. Waiting: a single job on an idle worker, and on one "
        "that a backfill saturates; a pass that has begun is not interrupted.",
        worker.backfill_targets,
        worker.backfill_tables,
        {},
    ),
    "gpu": Section(
        "GPU",
        "Engine and service on an accelerator.",
        nothing,
        worker.gpu_tables,
        {},
        absent="It has not been run: it needs a machine with an accelerator.",
    ),
}
