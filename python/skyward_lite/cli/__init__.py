"""The commands of `python -m skyward_lite`."""
