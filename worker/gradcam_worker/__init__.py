"""GPU-backed Celery workers that explain image classifiers with Grad-CAM.

Importing this package costs nothing: it holds the version only. Web apps import
`gradcam_worker.client.client`,
notebooks import `gradcam_worker.gradcam`, and operators type `gradcam`.
"""

__version__ = "0.1.0"
