"""One program over many chips.

In: the sizes of the mesh axes (`mesh.py`) and which logical axis each one shards (`rules.py`).
Out: a `Mesh`, shardings for parameters, state and batches, attention over a length that devices
share (`ring.py`), and layers in stages (`pipeline.py`). A layer names logical axes only, so a
strategy is changed in `gin/mesh/`, never in a layer.

Several hosts: `distributed.py` joins them and lets them agree, over the line of `line.py`, which
also finds who is missing or gone; `relay.py` keeps JAX from aborting before that is said;
`batches.py` lays the rows that each of them reads together.

`gather.py` gathers parameters where they are used and scatters their gradients; `exchange.py` sends
rows to the devices that want them. What `lm compile`
says of chips that are not there: `topology.py` has their figures and devices, `hlo.py` reads the
compiled program, `compile_report.py` adds it up in time and money (`prices.json` is the user's to
edit), `remedies.py` knows what would fit where the memory does not suffice.

What `lm plan` says without compiling is read from a traced step: `plan_program.py` gives each array
its sharding, `plan_arrays.py` finds which are in memory and what is computed at once,
`plan_memory.py` says from when to when, `plan_cost.py` adds up work and traffic. PLAN.md compares
memory and time with the compiler's.
"""
