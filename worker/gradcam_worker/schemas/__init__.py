"""The wire: jobs, options, status documents, shards, manifests; strict JSON. Begin at `job.Job`."""
