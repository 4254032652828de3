"""Calls, values and exceptions to bytes and back, at both ends.

batches.py and exceptions.py use payload.py, which uses pickler.py. The pickler asks reducers.py how to pickle an
object, and modules.py whether the far end can import it. blame.py finds what an error is about.

What is large travels beside the pickle, so that the core can send it once: arguments by streams.py, with flat.py for
lists of texts and the like, functions by functions.py. handles.py spares the core a second look at what cannot change.
"""
