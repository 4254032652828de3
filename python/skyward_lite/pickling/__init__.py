"""Calls, values and exceptions to bytes and back, at both ends."""
