"""What the two ends compare, by itself so that the node's entry points need nothing else."""

import sys

__version__ = "0.1.0"

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""A pickled function runs only in the Python minor version that pickled it (cloudpickle's rule)."""
