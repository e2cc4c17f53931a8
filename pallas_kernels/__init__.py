"""Kernels: arrays in, arrays out; they import jax alone.

One folder a kernel: `api.py` (the public function, with the mathematics in its docstring),
`reference.py` (plain jnp, the specification), and one file for each fast implementation.
`implementation=None` takes the fastest one that accepts the case, for the platform that the program
is lowered for; a name takes that one or raises `NotImplementedError("why")`.
"""
