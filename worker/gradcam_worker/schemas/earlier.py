"""What workers of before `StatusDocument.rows` say of a shard's rows: in its stage, and in names of metrics.

Such workers, backfills and reapers may run beside new ones while a fleet is upgraded. They pass over `rows`,
and drop it when they write the document again. So new workers still write the old form beside it, and read it
where `rows` is missing. Both may go with version 0.2: every 0.1 writes `rows`, and then `row_state` is
`document.rows`.
"""

import re

from gradcam_worker.schemas.status import RowSearch, RowState, StatusDocument

DONE = re.compile(r"explain (\d+) of \d+")
GROUP = re.compile(r"rows (\d+) to (\d+)")
ROW = re.compile(r"row (\d+)(?: but (\d+(?:,\d+)*))?")
FAILED = "failed_"  # and a code: the name of a metric


def row_state(document: StatusDocument) -> RowState:
    """What a document says of its shard's rows, whichever version wrote it.

    Args:
        document: A shard's, in any state.

    Returns:
        Its `rows`; where it has none, what its stage, its error's stage and its metrics say.
    """
    if document.rows is not None:
        return document.rows
    done = DONE.fullmatch(document.stage or "")
    failed = {
        name.removeprefix(FAILED): int(count)
        for name, count in document.metrics.items()
        if name.startswith(FAILED)
    }
    search = _search(document.error.stage or "") if document.error else None
    return RowState(done=int(done[1]) if done else 0, failed=failed, search=search)


def stage_of_progress(done: int, rows: int) -> str:
    """A running shard's stage, as `DONE` reads it."""
    return f"explain {done} of {rows}"


def metrics_of_failed(failed: dict[str, int]) -> dict[str, float]:
    """How many rows failed, by code, as metrics of a shard that succeeded."""
    return {f"{FAILED}{code}": float(count) for code, count in failed.items()}


def _search(stage: str) -> RowSearch | None:
    if group := GROUP.fullmatch(stage):
        return RowSearch(group=(int(group[1]), int(group[2])))
    if row := ROW.fullmatch(stage):
        left_out = tuple(int(one) for one in (row[2] or "").split(",") if one)
        return RowSearch(row=int(row[1]), left_out=left_out)
    return None
