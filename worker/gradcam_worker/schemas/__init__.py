"""The wire formats: jobs, options, status, shards, manifests; strict JSON. Begin at `job.Job`."""
