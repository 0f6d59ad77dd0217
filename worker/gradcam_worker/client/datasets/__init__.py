"""Backfills as a client sees them: submitting one, its state and its end. Begin at `submitted_backfills`."""
