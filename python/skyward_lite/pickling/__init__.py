"""Calls, values and exceptions to bytes and back, at both ends.

batches.py and exceptions.py use payload.py, which uses pickler.py. The pickler asks reducers.py how to pickle an
object, and modules.py whether the far end can import it. blame.py finds what an error is about.
"""
