"""The training loop: from the last good checkpoint to the last step, whatever happens between."""
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.data.loader import Loader
from lm.errors import UserError
from lm.parallel import executable
from lm.parallel.batches import GlobalBatch
from lm.parallel.distributed import Hosts
from lm.parallel.rules import Rules, axes_of
from lm.training import meters, monitor, watchdog
from lm.training.checkpoint import Checkpointer, restore_params
from lm.training.optimizers import evaluated
from lm.training.precision import LossScale
from lm.training.probe import Probe
from lm.training.state import TrainState, abstract_state, init_state
from lm.training.step import Loss, jit_train_step
from lm.training.validation import HeldOut
from lm.training.writers import Writer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long and on what a run trains.

  num_steps: updates of the whole run.
  batch_size: sequences a step, over all devices and hosts.
  sequence_length: tokens a sequence.
  num_microbatches: parts of a batch computed one after another (gradient accumulation).
  checkpoint_every, eval_every: steps between checkpoints, and between validation losses.
  eval_batches: batches of the held-out text in a validation loss during training.
  watch_every: steps between the norms by group and layer that are kept; at validation the model is
    probed too (`probe.py`). 0 watches neither.
  keep_checkpoints: latest checkpoints that stay, besides the best by validation loss.
  seed: of the parameters, the order of the data, and dropout.
  stuck_after_seconds: a step that takes longer is reported, with the stacks of every host.
  offload_optimizer: keeps the optimiser's state in the memory of the host.
  tpu_options: NAME=VALUE of the compiler of the step, on TPUs.
  loss_scale: what float16 needs; a step that overflows updates nothing.
  """
  num_steps: int = 1000
  batch_size: int = 8
  sequence_length: int = 512
  num_microbatches: int = 1
  checkpoint_every: int = 100
  eval_every: int = 100
  eval_batches: int = 8
  watch_every: int = 50
  keep_checkpoints: int = 2
  seed: int = 0
  stuck_after_seconds: int = 600
  offload_optimizer: bool = False
  tpu_options: tuple[str, ...] = ()
  loss_scale: Optional[LossScale] = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      least = 0 if field.name == 'watch_every' else 1
      if field.type is int and field.name != 'seed' and getattr(self, field.name) < least:
        raise ValueError(f'{field.name}={getattr(self, field.name)} must be at least {least}')
    if self.batch_size % self.num_microbatches:
      raise ValueError(f'batch_size={self.batch_size} does not divide into '
                       f'num_microbatches={self.num_microbatches} equal parts')


@dataclasses.dataclass(frozen=True)
class Trainer:
  """What a loop needs: the model, the data, and where to write.

  schedule: the optimiser's learning rate by step, for the metrics.
  data_digest: of the training tokens; a run goes on only with the same.
  peak_flops: FLOP/s of all devices; flops_per_token: of a step; their ratio gives MFU.
  hosts: who train together; host 0 writes metrics and shows progress.
  writers: who get the metrics too.
  """
  config: TrainConfig
  module: nn.Module
  loss: Loss
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  rules: Rules
  train_data: Loader
  validation_data: Loader
  data_digest: str
  run_dir: pathlib.Path
  flops_per_token: float
  peak_flops: float
  log: Callable[[str], None]
  hosts: Hosts = Hosts()
  writers: Sequence[Writer] = ()

  def run(self, compiled: pathlib.Path | None = None) -> dict[str, Any]:
    """Trains from the last good checkpoint to `num_steps`, or until a signal asks to stop.

    Every step is a pure function of the state and its number, so a run that was killed repeats, bit
    for bit, what it would have done.

    Args:
      compiled: a file of `executable.save`, from which the step starts if it is the same program.

    Returns:
      `final_loss, losses, steps, tokens_per_second, mfu, first_step_seconds, peak_rss_bytes,
      data_wait_share, stopped_by` (None, or the signal's name).

    Raises:
      UserError: the loss is not finite, the disk is full, the checkpoints are of another model.
    """
    self._check_rows()
    checkpointer = Checkpointer(self.run_dir / 'checkpoints', self.config.keep_checkpoints,
                                self.log, self.hosts)
    with contextlib.closing(checkpointer):
      state = self._restore(checkpointer)
      start, total = int(state.step), self.config.num_steps
      shown = self.hosts.is_main
      writer = (monitor.MetricsWriter(self.run_dir, start, self.writers, self.log) if shown
                else monitor.Silent())
      bar = monitor.ProgressBar(total, start) if shown else monitor.Silent()
      with contextlib.closing(writer), contextlib.closing(bar), watchdog.Watchdog(
          self.run_dir, self.hosts, self.config.stuck_after_seconds) as watch:
        return self._steps(state, checkpointer, writer, bar, watch, compiled)

  def _check_rows(self):
    rows = self.config.batch_size // self.config.num_microbatches
    shards = math.prod(self.rules.mesh.shape[axis] for axis in axes_of(self.rules.batch))
    if rows % shards:
      raise UserError(f'batch_size={self.config.batch_size} in {self.config.num_microbatches} '
                      f'microbatches gives {rows} rows, which do not divide over {shards} devices; '
                      f'the nearest batch_size that does is '
                      f'{-(-rows // shards) * shards * self.config.num_microbatches}')

  def _restore(self, checkpointer: Checkpointer) -> TrainState:
    """The last good checkpoint of this run, else imported parameters, else a new state."""
    size, offload = self.config.batch_size, self.config.offload_optimizer
    abstract = abstract_state(self.module, self.optimizer, self.rules, size, offload)
    if checkpointer.holds_params_alone():
      _, params = restore_params(checkpointer.directory, abstract.params, log=self.log)
      self.log('starts from the imported parameters')
      state = init_state(self.module, self.optimizer, self.rules, self.config.seed, size, offload)
      return dataclasses.replace(state, params=params)
    restored = checkpointer.restore(abstract)
    if restored is None:
      return init_state(self.module, self.optimizer, self.rules, self.config.seed, size, offload)
    step, state, data = restored
    position = self._position(step)
    if data != position:
      raise UserError(f'the checkpoint of step {step} was trained on {data} and this run has '
                      f'{position}; take the same data, or another --run_dir')
    self.log(f'continues from the checkpoint of step {step}')
    return state

  def _position(self, step: int) -> dict[str, Any]:
    """All that decides the batches from here on: the position in the data is a number of
    sequences."""
    return {'sequences': step * self.config.batch_size, 'seed': self.config.seed,
            'data': self.data_digest,
            'sequence_length': self.config.sequence_length}

  def _steps(self, state: TrainState, checkpointer: Checkpointer,
             writer: monitor.MetricsWriter | monitor.Silent,
             bar: monitor.ProgressBar | monitor.Silent, watch: watchdog.Watchdog,
             compiled: pathlib.Path | None) -> dict[str, Any]:
    config = self.config
    start, tokens_per_step = int(state.step), config.batch_size * config.sequence_length
    step_fn = self.hosts.same_program(jit_train_step(
        self.module, self.loss, self.optimizer, self.rules, state, config.num_microbatches,
        config.tpu_options), compiled and (lambda lowered: self._loaded(lowered, compiled)))
    held_out = HeldOut(self.module, self.loss, self.validation_data, self.hosts,
                       config.eval_batches)
    probe = (Probe(self.module, self.validation_data, self.hosts, self.log) if config.watch_every
             else lambda _: {})

    def validate(step):
      params = evaluated(state.opt_state, state.params)
      metrics = held_out(params, lambda: watch.beat(step + 1))
      writer.write(step, 'validation', metrics)
      if inside := probe(params):
        writer.write(step, 'probe', inside)
      return metrics

    rows = GlobalBatch(self.rules, config.batch_size)
    rates = np.asarray(jax.vmap(self.schedule)(jnp.arange(config.num_steps)))
    timer, losses, stopped_by = meters.StepTimer(), [], []
    watch.beat(start + 1)
    # Where a signal asked to stop before it was.
    if self._due(start) and not self.hosts.ask_main('evaluated', lambda: self._evaluated(start)):
      validate(start)
    with _signals() as received, self.train_data.iterate(
        start, config.num_steps - start, rows.own) as batches:
      for step in range(start + 1, config.num_steps + 1):
        with timer.waiting_for_data():
          batch = rows.place(next(batches))
        state, metrics = step_fn(state, batch)
        # While devices compute, all hosts say that they have begun, and agree whether to stop.
        asked = self.hosts.gather(watchdog.step_key(step), received[:1])
        norms = metrics.pop('norms')
        row = {name: float(value) for name, value in metrics.items()}
        timer.step_done(tokens_per_step)
        watch.beat(step + 1)
        self._check_finite(step, row['loss'], checkpointer)
        row |= timer.window() | {'learning_rate': float(rates[step - 1])}
        if 'tokens_per_second' in row:
          row['mfu'] = row['tokens_per_second'] * self.flops_per_token / self.peak_flops
        writer.write(step, 'train', row)
        if config.watch_every and step % config.watch_every == 0:
          writer.write(step, 'norms', jax.device_get(norms))
        losses.append(row['loss'])
        bar.update(step, row['loss'], row.get('tokens_per_second'), row.get('mfu'))
        stopped_by = received[:1] if self.hosts.count == 1 else sum(asked, [])
        with timer.paused():
          self._evaluate_and_save(step, state, validate, checkpointer, bool(stopped_by), bar)
          watch.beat(step + 1)
        if stopped_by:
          break
    checkpointer.wait()
    total = timer.total()
    rate = total.get('tokens_per_second')
    return {'final_loss': losses[-1] if losses else None, 'steps': int(state.step),
            'tokens_per_second': rate,
            'mfu': rate and rate * self.flops_per_token / self.peak_flops,
            'first_step_seconds': timer.first_step_seconds,
            'peak_rss_bytes': meters.peak_rss_bytes(),
            'data_wait_share': total.get('data_wait_share'),
            'stopped_by': stopped_by[0] if stopped_by else None, 'losses': losses}

  def _loaded(self, lowered: jax.stages.Lowered, path: pathlib.Path) -> jax.stages.Compiled | None:
    program, why_not = executable.load(path, lowered, self.rules.mesh.devices.flat)
    self.log(f'{why_not}; compiles' if why_not else f'starts from the executable in {path}')
    return program

  def _check_finite(self, step: int, loss: float, checkpointer: Checkpointer):
    if not math.isfinite(loss):
      checkpointer.wait()
      saved = checkpointer.latest_step()
      raise UserError(f'the loss of step {step} is {loss}; training stops and '
                      f'{"no checkpoint" if saved is None else f"the checkpoint of step {saved}"} '
                      'stands; lower LEARNING_RATE, raise WARMUP_STEPS, or look at the data of '
                      'that step, then start again')

  def _evaluate_and_save(self, step, state, validate, checkpointer, stopping, bar):
    """Validation loss and checkpoint where they are due; the last step has both."""
    config = self.config
    last = step == config.num_steps
    metrics = None
    if last or (self._due(step) and not stopping):
      metrics = validate(step)
      bar.note(f'step {step}: validation loss {metrics["loss"]:.4f}')
    if last or stopping or step % config.checkpoint_every == 0:
      checkpointer.save(step, state, self._position(step), metrics)

  def _due(self, step: int) -> bool:
    return step > 0 and step % self.config.eval_every == 0

  def _evaluated(self, step: int) -> bool:
    rows = monitor.read_rows(self.run_dir / monitor.METRICS)
    return any(row['step'] == step and row['split'] == 'validation' for row in rows)


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
  """Collects SIGTERM and SIGINT instead of dying of them; a second one is taken at its word."""
  received: list[str] = []

  def handler(number, _):
    if received:
      os._exit(128 + number)
    received.append(signal.Signals(number).name)

  numbers = (signal.SIGTERM, signal.SIGINT)
  try:
    before = [signal.signal(number, handler) for number in numbers]
  except ValueError:  # not in the main thread (a notebook's server): signals are its own
    yield received
    return
  try:
    yield received
  finally:
    for number, old in zip(numbers, before):
      signal.signal(number, old)
