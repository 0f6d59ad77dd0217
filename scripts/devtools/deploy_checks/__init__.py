"""docker/ and deploy/, checked without Docker and without a cluster. Begin with `checks`, which runs all."""
