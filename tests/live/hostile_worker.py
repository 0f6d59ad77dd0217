"""The worker of `test_hostile_text.py`: the real one, with a small network whose classes have hostile names.

python hostile_worker.py supervise      what `gradcam worker` does, with the settings of the environment
python hostile_worker.py work FD        what the supervisor starts
"""

import json
import os
import sys

from devtools.faults import tiny_worker

HOSTILE: str = json.loads(os.environ["HOSTILE_TEXT"])


def work(ready_fd: int) -> int:
    """`tiny_worker.work`, with other names."""
    from gradcam_worker.gradcam.classes import ClassIndex, Label
    from gradcam_worker.testing import TinyNetwork

    names = (HOSTILE, "green", "\x1b[31mblue\n")
    TinyNetwork.labels = ClassIndex(
        tuple(Label(number, f"n{number + 1}", name) for number, name in enumerate(names))
    )
    return tiny_worker.work(ready_fd)


if __name__ == "__main__":
    sys.exit(tiny_worker.supervise(__file__) if sys.argv[1] == "supervise" else work(int(sys.argv[2])))
