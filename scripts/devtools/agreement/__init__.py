"""Our numbers against the same computed in other ways: `scripts/agreement` and `scripts/networks`.

Begin with `comparisons`: each function there is one section of docs/explanation/agreement.md.
"""
