"""The commands of `skyward`."""
