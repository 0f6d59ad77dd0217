"""The earlier encoding of `StatusDocument.rows`: in the stage of a shard, and in the names of its metrics.

Processes of versions without `rows` may run beside newer ones during an upgrade. They ignore `rows`, and lose
it when they write the document again. So newer versions still write the earlier encoding too, and read it
where `rows` is missing. Both can be removed in version 0.2, since every 0.1 writes `rows`: then `row_state`
is `document.rows`.
"""

import re

from gradcam_worker.schemas.status import RowSearch, RowState, StatusDocument

DONE_STAGE = re.compile(r"explain (\d+) of \d+")
GROUP_STAGE = re.compile(r"rows (\d+) to (\d+)")
ROW_STAGE = re.compile(r"row (\d+)(?: but (\d+(?:,\d+)*))?")
FAILED_PREFIX = "failed_"  # of a metric's name, before an error code


def row_state(document: StatusDocument) -> RowState:
    """Read the state of a shard's rows from its document, whichever version wrote it.

    Args:
        document: The document of a shard, in any state.

    Returns:
        Its `rows`; if it has none, the state that its stage, its error's stage and its metrics encode.
    """
    if document.rows is not None:
        return document.rows
    done = DONE_STAGE.fullmatch(document.stage or "")
    failed = {
        name.removeprefix(FAILED_PREFIX): int(count)
        for name, count in document.metrics.items()
        if name.startswith(FAILED_PREFIX)
    }
    search = _parse_search(document.error.stage or "") if document.error else None
    return RowState(done=int(done[1]) if done else 0, failed=failed, search=search)


def stage_of_progress(done: int, rows: int) -> str:
    """Encode the progress of a running shard as its stage."""
    return f"explain {done} of {rows}"


def metrics_of_failed(failed: dict[str, int]) -> dict[str, float]:
    """Encode the numbers of failed rows, by error code, as metrics of a shard that succeeded."""
    return {f"{FAILED_PREFIX}{code}": float(count) for code, count in failed.items()}


def _parse_search(stage: str) -> RowSearch | None:
    if group := GROUP_STAGE.fullmatch(stage):
        return RowSearch(group=(int(group[1]), int(group[2])))
    if row := ROW_STAGE.fullmatch(stage):
        left_out = tuple(int(number) for number in (row[2] or "").split(",") if number)
        return RowSearch(row=int(row[1]), left_out=left_out)
    return None
