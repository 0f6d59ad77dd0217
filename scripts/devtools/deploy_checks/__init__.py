"""docker/ and deploy/, checked without Docker and without a cluster: `scripts/check-deploy`.

Begin with `checks`, which runs all of them.
"""
