"""`python -m gradcam_worker` is `gradcam`."""

import sys

from gradcam_worker.cli.main import main

sys.exit(main())
