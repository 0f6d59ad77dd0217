"""Other tools read what `gradcam audit export` writes for them, each with its own code.

    .venv/bin/pytest --large tests/devtools/test_export_readers.py

makes an environment with these tools in build/, which needs a package index and takes minutes.
"""
