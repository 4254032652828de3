"""The versions that the two ends compare, in a module of their own so that a node's first steps import nothing else."""

import sys

__version__ = "0.1.0"

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""A pickled function runs only in the Python minor version that pickled it (cloudpickle's rule)."""
