"""The pages that people read: an audit's, and the gallery of a backfill. Begin at `page`."""
