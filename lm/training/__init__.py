"""Logits in, better parameters out.

`step.py` the pure train step; `state.py` its state; `losses.py`; `optimizers/` and schedules;
`loop.py` batches to checkpoints, with signals and restarts; `validation.py` metrics of held-out
rows; `checkpoint.py` saves and restores (with `checkpoint_io.py`, arrays by Orbax, and
`integrity.py`, digests); `monitor.py` metrics.jsonl, TensorBoard and the progress bar;
`writers.py` tables, W&B, MLflow; `norms.py` norms by group; `probe.py` activations, attention and
experts; `meters.py` rates and the machine's peak; `watchdog.py` reports a stuck step.
"""
