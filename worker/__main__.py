"""`python -m worker` is `gradcam`."""

import sys

from worker.cli import main

sys.exit(main())
