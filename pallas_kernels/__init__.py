"""Kernels: arrays in, arrays out; they import jax alone.

One folder a kernel: `api.py` (the public function, with the mathematics in its docstring),
`reference.py` (plain jnp, the specification), and for each fast implementation `cpu*.py`, `tpu*.py`
(Mosaic) or `gpu*.py` (Triton); `cpu.cc` is C++, which `native.py` has the machine's own compiler
make when it is first used. `implementation=None` takes the fastest one that accepts the case,
for the platform that the program is lowered for; a name takes that one or raises
`NotImplementedError("why")`. The compiler does not cut a Pallas kernel over a mesh: there it
belongs inside `jax.shard_map`, as `lm/layers/kernels.py` has it.

`python -m pallas_kernels.NAME.bench` prints a kernel's cycles, by the TPU compiler and without a
TPU (`tpu_compiler.py`), at the shapes of its `specs.py`; `measure.py` adds the bytes that it moves.
`CYCLES.md` has those of all kernels and TPUs, by `table.py`.
`gpu_compiler.py` says which registers and shared memory a kernel takes on an NVIDIA GPU, and
`gpu_times.py` times all of them on the one in hand: `TIMES.md` has those of an H100.
"""
