"""`python -m gradcam_worker` runs the command `gradcam`."""

import sys

from gradcam_worker.cli.main import main

sys.exit(main())
