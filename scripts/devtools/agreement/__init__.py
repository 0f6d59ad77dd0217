"""Our numbers against the same computed in other ways: `scripts/agreement` and `scripts/networks`.

Begin with `report`: each function there that makes a table is one section of docs/explanation/agreement.md.
"""
