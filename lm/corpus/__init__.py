"""Documents in, clean text out.

In: glob patterns of the user's files, or nothing (then Python's own standard library is the
  corpus).
Out: a stream of `Document(name, text)`, in an order and under names that are the same on every
  machine.

Change `collect.py` to read another file format, `stdlib.py` to change what the embedded corpus
holds.
"""
