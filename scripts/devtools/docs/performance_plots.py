"""The plots of the page: light cards, so that they can be read in a light and in a dark theme."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from devtools.docs.performance_figures import Figures, plain

WIDTH = 8.6  # inches; 830 px, as wide as a README
BLUE, GREEN, ORANGE, GREY = "#2563a8", "#3c8d5a", "#d9772b", "#8a8f98"
STAGES = ("#4f7fb5", "#7fb2a5", "#c9a34e", "#d9772b", "#a65a78", "#7a6aa8", "#8a8f98", "#b9bec6", "#5d6670")
STYLE: dict[str, Any] = {
    "svg.hashsalt": "gradcam-worker",  # the same figures give the same bytes
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "xtick.color": "#444",
    "ytick.color": "#444",
    "legend.frameon": False,
}


def draw(found: Mapping[str, Figures], folder: Path) -> None:
    """Draw what can be drawn from these documents into a folder. Raises Hole."""
    plots: dict[str, tuple[str, Callable[[Figures, Path], None]]] = {
        "engine": ("share-of-forward.svg", share_of_forward),
        "peers": ("others.svg", partial(others, found.get("engine"))),
        "service": ("service.svg", service),
        "memory": ("memory.svg", memory),
    }
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a dictionary of such names it is
        for bench, (file, plot) in plots.items():
            if bench in found:
                plot(found[bench], folder / file)


@contextmanager
def panels(path: Path, count: int, height: float, **options: Any) -> Iterator[Any]:
    """Axes side by side, saved in the end."""
    figure, axes = plt.subplots(1, count, figsize=(WIDTH, height), layout="constrained", **options)
    yield axes
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def share_of_forward(found: Figures, path: Path) -> None:
    """A panel a network: share by number of classes, a line for each way and batch size."""
    networks = list(found.at("share_of_forward"))
    ways = (
        ("share_of_forward", "ours, batch {}", BLUE, {"1": "o", "8": "s", "32": "^"}, "-"),
        ("share_of_forward_exact_backward", "whole way back, batch {}", GREEN, {"8": "s"}, "--"),
        ("share_of_forward_repeated_tail", "tail once a class, batch {}", ORANGE, {"1": "o"}, ":"),
    )
    with panels(path, len(networks), 3.5, sharey=True, squeeze=False) as rows:
        for axes, network in zip(rows[0], networks, strict=True):
            for key, label, colour, batches, line in ways:
                for batch, marker in batches.items():
                    by_top = found.at(key, network).get(batch, {})
                    axes.plot(
                        list(by_top),
                        list(by_top.values()),
                        line,
                        marker=marker,
                        markersize=6,
                        color=colour,
                        label=label.format(batch),
                        clip_on=False,
                    )
            axes.axhline(1, color=GREY, linewidth=1)
            axes.set(title=title(network), xlabel="classes explained", ylim=(0, 1.08))
            axes.grid(visible=False, axis="x")
        rows[0][0].set_ylabel("share of the forward pass (CPU time)")
        rows[0][0].figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def others(engine: Figures | None, peers: Figures, path: Path) -> None:
    """A panel a network: how many times faster ours is, on a logarithmic scale."""
    ratios: dict[str, dict[str, dict[str, float]]] = {}  # network -> batch -> name
    for network, by_batch in peers.at("times_peer").items():
        ratios[network] = {
            batch: {name: peers.number("times_peer", network, batch, name, "wall") for name in names}
            for batch, names in by_batch.items()
        }
        if engine:
            ratios[network].setdefault("1", {})["the notebook"] = engine.number("times_notebook", network)
    largest: dict[str, float] = {}
    for by_batch in ratios.values():
        for name, ratio in (pair for one in by_batch.values() for pair in one.items()):
            largest[name] = max(ratio, largest.get(name, 0))
    names = sorted(largest, key=lambda name: -largest[name])
    with panels(path, len(ratios), 3.4, sharey=True, sharex=True, squeeze=False) as rows:
        for axes, (network, by_batch) in zip(rows[0], ratios.items(), strict=True):
            for batch, marker, colour, above in (("1", "o", BLUE, 5), ("8", "s", ORANGE, -13)):
                found = {names.index(name): ratio for name, ratio in by_batch.get(batch, {}).items()}
                axes.plot(
                    [*found.values()], [*found], marker, color=colour, label=f"batch {batch}", markersize=6
                )
                for place, ratio in found.items():
                    axes.annotate(
                        plain(ratio),
                        (ratio, place),
                        (0, above),
                        textcoords="offset points",
                        fontsize=8,
                        ha="center",
                        color=colour,
                    )
            axes.axvline(1, color=GREY, linewidth=1)
            axes.set(title=title(network), xscale="log", xlabel="times faster, wall time")
            axes.set_yticks(range(len(names)), names)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.margins(x=0.16, y=0.14)
            axes.grid(visible=False, axis="y")
        rows[0][0].figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def service(found: Figures, path: Path) -> None:
    """Share of the engine's speed; and the stages of a job, on top of each other."""
    networks = list(found.at("jobs_per_s"))[::-1]
    real = [name for name in networks if name not in {"no_time", "gpu_time"}]
    with panels(path, 2, 3.2, width_ratios=(1, 1.5)) as (left, right):
        shares = [found.number("share_of_engine", name) for name in real]
        bars = left.barh(list(map(title, real)), shares, color=BLUE, height=0.55)
        left.bar_label(bars, [plain(share) for share in shares], padding=4, fontsize=9)
        for name, least in found.at("required_share").items():
            if name in real:
                place = real.index(name)
                left.plot([least, least], [place - 0.38, place + 0.38], color=ORANGE, linewidth=2)
        left.plot([], [], color=ORANGE, linewidth=2, label="required")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22))
        left.set(title="Jobs/s, of the engine alone", xlabel="share of images/s", xlim=(0, 1.12))
        left.grid(visible=False, axis="y")
        stacked(right, found, networks)


def stacked(axes: Axes, found: Figures, networks: list[str]) -> None:
    """A bar a network, a colour a stage; behind it how long all took together."""
    stages = [name for name in found.at("stage_seconds", networks[0]) if name.endswith("_s")]
    stages.remove("queue_s")  # as long as the bench fills the queue
    total = {
        name: sum(found.number("stage_seconds", name, stage) for stage in stages) or 1.0 for name in networks
    }
    starts = [0.0] * len(networks)
    for stage, colour in zip(stages, STAGES, strict=False):
        parts = [found.number("stage_seconds", name, stage) / total[name] for name in networks]
        label = stage.removesuffix("_s").replace("_", " ")
        axes.barh(list(map(title, networks)), parts, left=starts, color=colour, height=0.55, label=label)
        starts = [before + more for before, more in zip(starts, parts, strict=True)]
    for place, name in enumerate(networks):
        axes.annotate(f"{1e3 * total[name]:.0f} ms", (1.02, place), va="center", fontsize=9)
    axes.set(title="Where a job's time in the worker goes", xlim=(0, 1.2), xlabel="share (medians)")
    axes.set_xticks((0, 0.25, 0.5, 0.75, 1))
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, -0.22), ncols=4, columnspacing=1, handlelength=1)


def memory(found: Figures, path: Path) -> None:
    """Resident set over time, from zero, so that what looks flat is."""
    curve = found.at("resident_mb")
    times = [found.number("resident_mb", place, "second") / 60 for place in range(len(curve))]
    sizes = [found.number("resident_mb", place, "mb") for place in range(len(curve))]
    with panels(path, 1, 2.6) as axes:
        axes.plot(times, sizes, color=BLUE, linewidth=2)
        axes.fill_between(times, sizes, color=BLUE, alpha=0.12)
        axes.set(
            xlabel="minutes", ylabel="resident set (MB)", ylim=(0, max(sizes) * 1.15), xlim=(0, times[-1])
        )
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def title(network: str) -> str:
    """A network as people write it."""
    known = {
        "vgg16": "VGG16",
        "xception": "Xception",
        "efficientnet_lite0": "EfficientNet-Lite0",
        "no_time": "takes no time",
        "gpu_time": "takes a GPU's time",
    }
    return known.get(network, network)
