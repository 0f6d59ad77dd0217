"""The library's figures on the page: engine, other libraries, the host's work. All raise Hole."""

import re
from collections.abc import Iterator

from devtools.docs.performance_figures import Figures, Target, at_least, at_most, plain, table, tiny

Lines = Iterator[str]


def engine_targets(found: Figures) -> Iterator[Target]:
    """Share of the forward pass, and times the notebook's speed."""
    for network, required in found.at("required").items():
        for what, least in required.items():
            cell = re.fullmatch(r"share of forward, batch (\d+), top (\d+)", what)
            value = (
                found.number("share_of_forward", network, *cell.groups())
                if cell
                else found.number("times_notebook", network)
            )
            yield at_least(f"{network}: {what}", least, value)


def engine_tables(found: Figures) -> Lines:
    """Shares by batch and classes, by method, and by precision."""
    rows = []
    for network in found.at("share_of_forward"):
        for way, key in (
            ("ours", "share_of_forward"),
            ("the whole way back", "share_of_forward_exact_backward"),
            ("the tail once a class", "share_of_forward_repeated_tail"),
        ):
            for batch, by_top in found.at(key, network).items():
                shares = [plain(by_top[top]) if top in by_top else "" for top in ("1", "8", "50")]
                rows.append((network, way, batch, *shares))
    yield "Share of the forward pass, in CPU time:"
    yield ""
    yield from table(("network", "way", "batch", "top 1", "top 8", "top 50"), rows)
    yield "*The whole way back* takes the gradient of every activation, as `GRADCAM_EXACT_BACKWARD` does;"
    yield "*the tail once a class* is what most libraries do. Times the notebook's speed, one image, top 8:"
    yield ""
    notebook = [
        (
            network,
            plain(found.number("times_notebook", network)),
            plain(found.number("times_notebook_cpu", network)),
        )
        for network in found.at("times_notebook")
    ]
    yield from table(("network", "wall time", "CPU time"), notebook)
    methods = found.at("share_of_forward_by_method")
    names = list(next(iter(methods.values()), {}))
    yield "Every method, as a share of the forward pass in CPU time, batch 8, top 8:"
    yield ""
    yield from table(
        ("method", *methods),
        (
            (f"`{name}`", *(plain(found.number("share_of_forward_by_method", one, name)) for one in methods))
            for name in names
        ),
    )
    yield "Fewer digits, against float32 (heatmaps in [0, 1]; random weights make nearly flat maps, whose"
    yield "differences say more about the noise than about the precision):"
    yield ""
    yield from table(
        ("network", "precision", "speed, wall", "speed, CPU", "largest difference of a heatmap"),
        (
            (one, f"`{name}`", plain(each["speed"]), plain(each["speed_cpu"]), tiny(each["difference"]))
            for one, precisions in found.at("precision").items()
            for name, each in precisions.items()
        ),
    )


def peers_targets(found: Figures) -> Iterator[Target]:
    """Ahead of each library, at its best."""
    for network, by_batch in found.at("times_peer").items():
        for batch, peers in by_batch.items():
            ratios = {peer: min(both["wall"], both["cpu"]) for peer, both in peers.items()}
            closest = min(ratios, key=lambda peer: ratios[peer], default=None)
            if closest:
                what = f"{network}: faster than any other library, batch {batch} (the closest: {closest})"
                yield Target(
                    what, "more than 1 times", f"{plain(ratios[closest])} times", ratios[closest] > 1
                )


def peers_tables(found: Figures) -> Lines:
    """Speeds and ratios, agreement, and who is not in the comparison."""
    rows = []
    for network, by_batch in found.at("images_per_s").items():
        for batch, speeds in by_batch.items():
            for name, speed in speeds.items():
                ahead = found.at("times_peer", network, batch).get(name)
                ratios = (plain(ahead["wall"]), plain(ahead["cpu"])) if ahead else ("", "")
                same = found.at("agreement", network).get(name)
                rows.append(
                    (network, batch, name, plain(speed), *ratios, tiny(same["difference"]) if same else "")
                )
    yield from table(
        ("network", "batch", "library", "images/s", "ours faster by, wall", "CPU", "maps differ by"), rows
    )
    left_out = [f"{peer} cannot be installed here: {why}." for peer, why in found.at("not_installed").items()]
    for network, failed in found.at("failed").items():
        left_out += [f"{peer} does not run here, with {network}: {why}." for peer, why in failed.items()]
    for network, peers in found.at("not_comparable").items():
        left_out += [f"{peer} gives other maps than ours, with {network}: not compared." for peer in peers]
    yield from left_out or ["All five install, run and agree."]
    yield ""


def host_targets(found: Figures) -> Iterator[Target]:
    """Times the floor at both sizes."""
    top, most = str(found.at("default_top")), found.number("required_times_floor")
    for size in found.at("times_floor"):
        yield at_most(
            f"{size}, top {top}: CPU time, by the codecs' alone",
            most,
            found.number("times_floor", size, top),
            " times",
        )


def host_tables(found: Figures) -> Lines:
    """Times the floor, where the time goes, and what encoders cost."""
    sizes = list(found.at("times_floor"))

    def ms(*keys: str) -> str:
        return f"{1e3 * found.number(*keys):.2f}"

    yield from table(
        ("photo", "classes", "codecs alone, CPU ms", "ours, CPU ms", "times the codecs"),
        (
            (size, top, *(ms("seconds", size, top, way, "cpu") for way in ("floor", "ours")), plain(times))
            for size in sizes
            for top, times in found.at("times_floor", size).items()
        ),
    )
    yield "Where ours goes, CPU ms:"
    yield ""
    stages = found.at("stages", sizes[0])
    yield from table(("", *sizes), ((name, *(ms("stages", size, name) for size in sizes)) for name in stages))
    yield "Encoders of one overlay, CPU ms (and size):"
    yield ""
    yield from table(
        ("", *sizes),
        (
            (
                name,
                *(
                    f"{ms('encoders', size, name, 'cpu')} "
                    f"({found.number('encoders', size, name, 'kilobytes'):.0f} KB)"
                    for size in sizes
                ),
            )
            for name in found.at("encoders", sizes[0])
        ),
    )
