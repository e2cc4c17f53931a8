"""Kernels: arrays in, arrays out; they import jax alone.

One folder a kernel: `api.py` (the public function, with the mathematics in its docstring),
`reference.py` (plain jnp, the specification), and one file for each fast implementation.
`implementation=None` takes the fastest one that accepts the case, for the platform that the program
is lowered for; a name takes that one or raises `NotImplementedError("why")`. The compiler
does not cut a TPU kernel over a mesh: there it belongs inside `jax.shard_map`.

`python -m pallas_kernels.NAME.bench` prints a kernel's cycles, by the TPU compiler and without a
TPU (`tpu_compiler.py`), at the shapes of its `specs.py`; `measure.py` adds the bytes that it moves.
"""
