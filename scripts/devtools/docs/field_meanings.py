"""What the fields of a job mean, for the reference pages, until the model says so in their `description`.

`tests/docs/test_reference.py` fails where a field has no meaning, or one is left over.
"""

JOB = {
    "schema": "version of this format",
    "id": "submitting the same id twice runs it once",
    "idempotency_key": "your own name for the job; submitting it twice runs it once",
    "image": "a URI alone, or an object with `uri` and `sha256`",
    "network": "a name of the catalog, or one that the operator registered",
    "target": "which classes to explain",
    "method": "how to compute the heatmaps",
    "artifacts": "what to store; each kind and format once",
    "metrics": "how faithful each heatmap is",
    "output": "where to store it, below what the operator allows; none: `GRADCAM_OUTPUT`",
    "priority": "`high` first; `bulk` has a queue of its own",
    "expires_at": "if it was not started by then, it ends as `expired`",
    "timeout_s": "for one attempt",
    "max_attempts": "starts, before it fails as `max_attempts_exceeded` or with its last error",
    "webhooks": "receivers of events",
    "metadata": "your own names and values, at most 16; returned in the status document",
    "traceparent": "W3C Trace Context; filled from the current span",
}
