"""Write the JSON schemas of the wire formats to deploy/schemas again; with --check, only check them."""

import json
import sys

from devtools import ROOT
from devtools.docs.reference_pages import DOCUMENTS, write

FOLDER = ROOT / "deploy" / "schemas"


def main(arguments: list[str]) -> int:
    """Write the files; with --check, only name those that are not current."""
    files = {
        FOLDER / name: json.dumps(model.model_json_schema(by_alias=True), indent=2, sort_keys=True) + "\n"
        for model, name, _ in DOCUMENTS.values()
    }
    return write(files, check="--check" in arguments, program="scripts/schemas")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
