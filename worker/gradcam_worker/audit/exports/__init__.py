"""A backfill's dataset in the formats of other tools: `gradcam audit export`. Begin at `export`."""
