"""The commands that make, read, compare and export datasets. Begin at `backfill`."""
