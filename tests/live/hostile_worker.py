"""The worker of `test_hostile_text.py`: the real one, with a small network whose classes have hostile names.

python hostile_worker.py supervise      what `gradcam worker` does, with the settings of the environment
python hostile_worker.py work FD        what the supervisor starts
"""

import json
import os
import sys

from devtools.faults import tiny_worker
from gradcam_worker.gradcam.classes import ClassIndex, Label
from gradcam_worker.testing import TinyNetwork

HOSTILE: str = json.loads(os.environ["HOSTILE_TEXT"])


if __name__ == "__main__":
    TinyNetwork.labels = ClassIndex(
        (Label(0, "n1", HOSTILE), Label(1, "n2", "green"), Label(2, "n3", "\x1b[31mblue\n"))
    )
    sys.exit(
        tiny_worker.supervise(__file__) if sys.argv[1] == "supervise" else tiny_worker.work(int(sys.argv[2]))
    )
