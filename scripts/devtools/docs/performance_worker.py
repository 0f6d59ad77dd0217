"""The worker's figures on the page: service, latency, memory, threads, GPU. All raise Hole."""

from collections.abc import Iterator, Mapping

from devtools.docs.performance_figures import Figures, Target, at_least, at_most, plain, table

Lines = Iterator[str]


def service_targets(found: Figures) -> Iterator[Target]:
    """Share of the engine; the device kept busy."""
    for network, least in found.at("required_share").items():
        yield at_least(
            f"{network}: jobs/s, as a share of the engine alone",
            least,
            found.number("share_of_engine", network),
        )
    most, idle = found.number("required_idle"), found.number("device_idle", "gpu_time")
    yield Target("a device as fast as a GPU: idle", f"under {most:.0%}", f"{idle:.0%}", idle < most)


def service_tables(found: Figures) -> Lines:
    """Speeds, what limits, and who uses the cores."""
    networks = list(found.at("jobs_per_s"))
    yield from table(
        ("network", "jobs/s", "engine alone, images/s", "share of engine", "device idle", "mean batch"),
        (
            (
                NAMES.get(one, one),
                plain(found.number("jobs_per_s", one)),
                plain(found.number("engine_images_per_s", one)),
                plain(found.number("share_of_engine", one)),
                f"{found.number('device_idle', one):.0%}",
                plain(_mean_batch(found.at("passes", one))),
            )
            for one in networks
        ),
    )
    ceiling = plain(found.number("ceiling_jobs_per_s"))
    yield f"The ceiling of the machinery is {ceiling} jobs/s. CPU milliseconds a job, and what limits:"
    yield ""
    who = list(found.at("cpu_ms_per_job", networks[0]))
    yield from table(
        ("network", *who, "what limits"),
        (
            (
                NAMES.get(one, one),
                *(f"{found.number('cpu_ms_per_job', one, each):.1f}" for each in who),
                found.at("bottleneck", one),
            )
            for one in networks
        ),
    )


NAMES = {"no_time": "a stand-in that takes no time", "gpu_time": "a stand-in that takes a GPU's time"}


def _mean_batch(passes: Mapping[str, int]) -> float:
    total = sum(passes.values())
    return sum(int(size) * count for size, count in passes.items()) / total if total else 0.0


def latency_targets(found: Figures) -> Iterator[Target]:
    """What a lone job waits for beside its pass."""
    yield at_most(
        "a lone job: everything but the pass, median",
        1e3 * found.number("required_overhead_s"),
        1e3 * found.number("overhead_s", "alone", 50),
        " ms",
    )
    yield at_most(
        "a lone job: wait for its batch, median",
        1e3 * found.number("required_batch_wait_s"),
        1e3 * found.number("batch_wait_s"),
        " ms",
    )


def latency_tables(found: Figures) -> Lines:
    """Alone, and beside a stream of bulk jobs."""
    both = list(found.at("overhead_s"))
    headings = [f"{name}, {what}" for name in both for what in ("median", "99 %")]

    def row(title: str, *keys: str) -> tuple[str, ...]:
        return (
            title,
            *(
                f"{1e3 * found.number(keys[0], name, *keys[1:], percent):.2f}"
                for name in both
                for percent in (50, 99)
            ),
        )

    bulk = found.number("bulk_jobs_per_s")
    yield f"Milliseconds, {found.at('network')}; busy: {bulk:.1f} bulk jobs a second beside it."
    yield ""
    yield from table(
        ("", *headings),
        [
            row("**everything but the pass**", "overhead_s"),
            *(row(part.replace("_", " "), "parts_s", part) for part in found.at("parts_s", both[0])),
            row("the pass itself", "explain_s"),
        ],
    )


def memory_targets(found: Figures) -> Iterator[Target]:
    """It stays."""
    most = found.number("required_growth")
    growth = found.number("growth")
    yield Target("resident memory: growth", f"at most {most:.0%}", f"{growth:+.1%}", growth <= most)
    if found.at("device_growth") is not None:
        device = found.number("device_growth")
        yield Target("the device's memory: growth", f"at most {most:.0%}", f"{device:+.1%}", device <= most)


def memory_tables(found: Figures) -> Lines:
    """The jobs that were run."""
    jobs = found.at("jobs")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in jobs.items())
    yield f"{sum(jobs.values()):,} jobs, {found.number('jobs_per_s'):.1f} a second: {kinds}."
    yield f"The largest resident set was {found.number('resident_peak_mb'):,.0f} MB."
    yield ""


def threads_tables(found: Figures) -> Lines:
    """Images per second by threads: of jobs and of TensorFlow; then of OpenCV."""
    settings: list[str] = []
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for place in range(len(found.at("rows"))):
        network, batch, jobs, opencv, intra, inter = (
            str(found.at("rows", place, key))
            for key in ("network", "batch", "jobs", "opencv", "intra_op", "inter_op")
        )
        setting = f"{intra} / {inter}"
        settings += [] if setting in settings else [setting]
        speed = plain(found.number("rows", place, "images_per_s"))
        cells.setdefault((network, batch, "none" if jobs == "0" else jobs, opencv), {})[setting] = speed
    yield "Images per second; the last columns: TensorFlow's threads within / beside operations:"
    yield ""
    yield from table(
        ("network", "batch", "job threads", "OpenCV's", *settings),
        ((*cell, *(speeds.get(one, "") for one in settings)) for cell, speeds in cells.items()),
    )
    jobs, intra, inter = (found.at("best", key) for key in ("jobs", "intra_op", "inter_op"))
    yield f"Best at full batches, over both networks: {jobs} job threads, TensorFlow {intra} / {inter}."
    yield ""


def backfill_targets(found: Figures) -> Iterator[Target]:
    """A shard costs little beside its passes, and no row is lost."""
    network, least = found.at("network"), found.number("required_share")
    yield at_least(f"{network}: shards, as a share of the engine", least, found.number("share_of_engine"))
    yield at_least(
        "rows/s of the longest input, as a share of the shortest's",
        found.number("required_linear"),
        found.number("linear"),
    )
    for what in ("lost", "doubled"):
        number = found.number(f"rows_{what}")
        yield Target(f"everybody killed at random: rows {what}", "0", f"{number:.0f}", not number)


def backfill_tables(found: Figures) -> Lines:
    """Speed, tracking, and who waits beside it."""
    ways = {"the engine alone": "engine", "a backfill, in shards": "shard", "jobs of one image each": "job"}
    yield f"Images a second, {found.at('network')}, {found.number('batch'):.0f} images a pass:"
    yield ""
    yield from table(
        ("", "images/s"),
        [(way, f"{found.number(f'{name}_images_per_s'):.1f}") for way, name in ways.items()],
    )
    yield f"In CPU time, worker and servers together, the share is {found.number('share_of_engine_cpu'):.2f}."
    yield ""
    rows = [
        (
            f"{int(count):,}",
            f"{found.number('tracking', count, 'rows_per_s'):.0f}",
            f"{found.number('tracking', count, 'submitter_mb'):.0f}",
            f"{found.number('tracking', count, 'redis_mb'):.1f}",
        )
        for count in found.at("tracking")
    ]
    yield from table(("rows", "rows/s", "submitter, MiB", "Redis, MiB more"), rows)
    kills = found.at("kills")
    yield f"{kills['rows']:,} rows, submitter and workers killed {kills['kills']} times: see above."
    yield ""
    yield "A single job, from submit to the return of wait, milliseconds:"
    yield ""
    yield from table(
        ("worker", "median", "95 %"),
        [
            (name, *(f"{found.number(f'interactive_p{percent}_ms', name):.0f}" for percent in (50, 95)))
            for name in found.at("interactive_p50_ms")
        ],
    )


def gpu_tables(found: Figures) -> Lines:
    """The engine's and the service's figures there."""
    yield f"On {found.at('device')}, {found.at('backend')}."
    yield ""
    seconds = found.at("engine", "seconds")
    rows = []
    for network, ways in seconds.items():
        for way, by_batch in ways.items():
            for batch, took in by_batch.items():
                forward = ways.get("forward", {}).get(batch)
                share = plain(forward["wall"] / took["wall"]) if forward else ""
                rows.append((network, way, batch, plain(int(batch) / took["wall"]), share))
    yield from table(("network", "way", "batch", "images/s", "share of forward, wall time"), rows)
    yield from service_tables(found.part("service"))
