"""Does the best learning rate stay where it is when a model grows wider? muP against the usual way.

  python scripts/mup_transfer.py --out=runs/mup           # the sweep, some five minutes
  python scripts/mup_transfer.py --out=runs/mup --check   # the coordinate check alone

A GPT of two layers learns the bytes of this package's source with AdamW, at four widths and a grid
of learning rates, a factor of two apart; heads have 16 dimensions at every width. With muP,
`base_width` is the narrowest width. The sweep prints the loss (nats a byte, of the last 10 steps,
mean over the seeds) and the best rate of each width; the check (arXiv:2203.03466, appendix D.1) how
much the first steps change the targets' logits, which should not depend on the width. Both are
drawn, by matplotlib (the extra `test`).

Seen at the defaults (60 steps, two seeds): with muP 2^-6 is best at 32, 64, 128 and 256 dimensions,
with losses 3.048, 2.952, 2.851, 2.816; the usual way it is 2^-6, 2^-6, 2^-7 and 2^-8. Logits of the
targets move after ten steps like width^0.05 with muP, width^0.75 without.
"""
import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lm
from lm.models.gpt import GPTConfig
from lm.parallel.mesh import MeshConfig
from lm.parallel.rules import Rules
from lm.training.losses import Prediction
from lm.training.optimizers import AdamW, Schedule
from lm.training.state import init_state
from lm.training.step import train_step

WIDTHS = 32, 64, 128, 256
RATES = tuple(2.0**power for power in range(-9, -3))
SOURCE = pathlib.Path(lm.__file__).parent
TEXT = b''.join(path.read_bytes() for path in sorted(SOURCE.rglob('*.py')))
BATCH, LENGTH = 8, 32


def batch_of(step: int, seed: int) -> dict[str, np.ndarray]:
  """Windows of the text."""
  starts = np.random.default_rng([seed, step]).integers(len(TEXT) - LENGTH - 1, size=BATCH)
  windows = np.stack([np.frombuffer(TEXT, np.uint8, LENGTH + 1, start) for start in starts])
  return {'decoder_input_tokens': windows[:, :-1].astype(np.int32),
          'decoder_target_tokens': windows[:, 1:].astype(np.int32),
          'decoder_loss_weights': np.ones((BATCH, LENGTH), np.float32)}


class Subject:
  """A model of one width; the learning rate is an argument, so that it compiles once."""

  def __init__(self, width: int, base_width: int | None, num_steps: int):
    self.config = GPTConfig(
        vocab_size=256, max_length=LENGTH, d_model=width, num_layers=2, num_heads=width // 16,
        d_ff=4 * width, norm='rmsnorm', positions='rotary', activation='gelu', use_bias=False,
        tie_embeddings=False, base_width=base_width, init_std=WIDTHS[0]**-0.5, dtype='float32')
    self.rules = Rules().on(MeshConfig(data=1).build(jax.devices()[:1]))
    self.module = self.config.build(self.rules)
    # Updates are proportional to the learning rate, which is 1 here.
    schedule = Schedule('linear', 1.0, warmup_steps=num_steps // 10)
    self.optimizer = AdamW(schedule, weight_decay=0.0).build(num_steps, self.config.width)
    self.start = functools.cache(lambda seed: init_state(self.module, self.optimizer, self.rules,
                                                         seed))

  @functools.partial(jax.jit, static_argnums=0)
  def step(self, state, batch, rate):
    """A train step at this learning rate."""
    update = lambda *args, **extra: (lambda updates, s: (optax.tree.scale(rate, updates), s))(
        *self.optimizer.update(*args, **extra))
    scaled = optax.GradientTransformationExtraArgs(self.optimizer.init, update)
    return train_step(self.module, Prediction(), scaled, 1, state, batch)

  @functools.partial(jax.jit, static_argnums=0)
  def scores(self, params, batch):
    """The logits of the targets."""
    apply = functools.partial(self.module.apply, {'params': params})
    logits = apply(apply(jnp.asarray(batch['decoder_input_tokens']))[0], method='logits')
    return jnp.take_along_axis(logits, batch['decoder_target_tokens'][..., None], axis=-1)

  def loss(self, rate: float, seed: int, num_steps: int) -> float:
    """At the end of a run."""
    state, losses = self.start(seed), []
    for step in range(num_steps):
      state, metrics = self.step(state, batch_of(step, seed), rate)
      losses.append(metrics['loss'])
    return float(np.mean(losses[-10:]))

  def moved(self, rate: float, num_steps: int) -> float:
    """Root mean square of the change of the targets' logits, where few tokens are learnt: what many
    tokens, and other logits, change adds up like noise, which falls with the width."""
    state, batch = self.start(0), {name: x[:1, :8] for name, x in batch_of(0, 0).items()}
    before = self.scores(state.params, batch)
    for step in range(num_steps):
      state, _ = self.step(state, batch, rate)
    return float(jnp.sqrt(jnp.square(self.scores(state.params, batch) - before).mean()))


def draw(xs, curves: dict[str, list[float]], labels: tuple[str, str], path: pathlib.Path):
  """Curves over a logarithmic axis; those of muP are solid."""
  import matplotlib
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  plt.figure(figsize=(7, 4.5))
  for name, ys in curves.items():
    plt.plot(xs, ys, label=name, marker='.', linestyle='-' if 'muP' in name else '--')
  plt.xscale('log', base=2), plt.xlabel(labels[0]), plt.ylabel(labels[1]), plt.legend()
  plt.savefig(path, dpi=120, bbox_inches='tight')


def check(out: pathlib.Path):
  """Prints and draws how far the logits of targets move, by width."""
  curves = {}
  for name, base in (('muP', WIDTHS[0]), ('usual', None)):
    for steps in (1, 3, 10):
      moves = [Subject(width, base, 100).moved(2.0**-7, steps) for width in WIDTHS]
      slope = np.polyfit(np.log(WIDTHS), np.log(moves), 1)[0]
      curves[f'{name}, {steps} steps'] = moves
      shown = ' '.join(f'{x:8.4f}' for x in moves)
      print(f'{name:6} {steps:3} steps: {shown}   ~ width^{slope:.2f}', flush=True)
  draw(WIDTHS, curves, ('d_model', "change of the targets' logits"), out / 'coordinate_check.png')


def transfer(out: pathlib.Path, num_steps: int, seeds: int):
  """Prints and draws the loss by learning rate and width."""
  curves, best = {}, {}
  for name, base in (('muP', WIDTHS[0]), ('usual', None)):
    for width in WIDTHS:
      start, subject = time.time(), Subject(width, base, num_steps)
      losses = [float(np.mean([subject.loss(rate, seed, num_steps) for seed in range(seeds)]))
                for rate in RATES]
      curves[f'{name}, {width}'] = losses
      best[f'{name}, {width}'] = RATES[int(np.nanargmin(losses))]
      print(f'{name:6} {width:4}: {" ".join(f"{x:.3f}" for x in losses)}   best '
            f'2^{np.log2(best[f"{name}, {width}"]):.0f}   {time.time() - start:.0f} s', flush=True)
  (out / 'transfer.json').write_text(json.dumps({'rates': RATES, 'losses': curves, 'best': best}))
  draw(RATES, curves, ('learning rate', 'loss, nats a byte'), out / 'transfer.png')


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--check', action='store_true', help='the coordinate check alone')
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seeds', type=int, default=2)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  check(args.out)
  if not args.check:
    transfer(args.out, args.steps, args.seeds)


if __name__ == '__main__':
  main()
