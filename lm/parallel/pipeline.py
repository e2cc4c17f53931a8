"""Layers over stages of devices, through which parts of the batch follow each other (pipeline
parallelism): GPipe (arXiv:1811.06965) and, with several turns, the circular schedule, whose stages
have every S-th group of layers (arXiv:2104.04473, section 2.2).

L layers are R S groups, of which stage s of S has the groups s, S + s, and so on: a microbatch goes
round all stages R times. At every tick each stage takes one microbatch through one group and sends
it on. M microbatches start in teams of S, all R turns of a team before the next team, so that what
comes back to stage 0 is wanted there at once.

Each stage keeps one microbatch of each team. Those go round against the work: the next one is at
stage 0 when its turn comes, and a finished one takes its place. So no device ever has more rows
than without stages, and each gets back those that it gave.

The M R groups of work that a stage has take M R + S - 1 ticks. In the other S - 1, the bubble, it
computes what nothing uses, of a real microbatch that has left out some layers: finite numbers,
whose gradient is exactly 0.
"""
from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lm.errors import UserError
from lm.parallel.rules import Rules, axes_of


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How M microbatches go R times through S stages."""
  stages: int
  turns: int
  microbatches: int

  @property
  def teams(self) -> int:
    """K, of S microbatches each."""
    return self.microbatches // self.stages

  @property
  def ticks(self) -> int:
    """Until the last group of the last microbatch is done."""
    return self.microbatches * self.turns + self.stages - 1

  @property
  def bubble(self) -> float:
    """The share of the ticks in which a stage has no work."""
    return (self.stages - 1) / self.ticks


def check_layers(rules: Rules, num_layers: int) -> None:
  """Refuses layers that do not divide over the stages.

  Raises:
    UserError: it names the nearest numbers of stages that do.
  """
  S, R = rules.shards('layers'), rules.pipeline_turns
  if num_layers % (S * R):
    turns = '' if R == 1 else f' in Rules.pipeline_turns={R}'
    fits = [n for n in range(1, num_layers + 1) if num_layers % (n * R) == 0]
    raise UserError(f'{_axis(rules)} does not divide {num_layers} layers{turns}; ' + (
        f'the nearest that does is {_nearest(fits, S)}' if fits else
        f'take turns that divide {num_layers}'))


def schedule(rules: Rules, batch_size: int) -> Schedule:
  """How a batch of so many rows goes through the stages.

  Raises:
    UserError: the rows do not divide over the devices, or those of a device over the microbatches.
  """
  S, M, axes = rules.shards('layers'), rules.pipeline_microbatches, axes_of(rules.layers)
  copies = math.prod(rules.mesh.shape[axis] for axis in axes_of(rules.batch) if axis not in axes)
  rows, fits = batch_size // copies, copies * S
  if batch_size % fits:
    near = sorted({batch_size // fits * fits, -(-batch_size // fits) * fits} - {0})
    raise UserError(f'{batch_size} rows do not divide over {_axis(rules)} and the {copies} devices '
                    f'of a stage that share the batch; the nearest that do are '
                    f'{" or ".join(map(str, near))}')
  M = rows if M is None else M
  if M % S or rows % M:
    fits = [n for n in range(S, rows + 1, S) if rows % n == 0]
    raise UserError(f'Rules.pipeline_microbatches={M} is not a multiple of {_axis(rules)} that '
                    f'divides the {rows} rows of a device; the nearest that is is '
                    f'{_nearest(fits, M)}')
  return Schedule(S, rules.pipeline_turns, M)


def _axis(rules):
  return f'mesh axis {", ".join(axes_of(rules.layers))}={rules.shards("layers")}'


def _nearest(fits, size):
  """The nearest below and above."""
  return ' or '.join(f'{n}' for n in (*[n for n in fits if n < size][-1:],
                                      *[n for n in fits if n > size][:1]))


def run(layer: Callable, rematerialised: Callable, rules: Rules, x: Any, rows: Any, shared: Any,
        layer_rows: Any, per_layer: Any) -> tuple[Any, Any]:
  """Takes x through all layers.

  Args:
    layer: `layer(rules)` is called as `(x, rows, shared, layer_rows, per_layer) -> (x, output)`
      inside `jax.shard_map` over mesh axes that `rules` do not have there.
    rematerialised: makes of a function of one layer another that keeps less for its gradient.
    x, rows: leaves [B, ...].
    shared: leaves without rows.
    layer_rows: leaves [L, B, ...].
    per_layer: leaves [L, ...] without rows.

  Returns:
    x, and the outputs of all layers, [L, B, ...]; what is a scalar of a layer is summed over all
    rows, [L].
  """
  L, B = (len(jax.tree.leaves(tree)[0]) for tree in (per_layer, x))
  check_layers(rules, L)
  plan, cut = schedule(rules, B), _Cut(rules)
  split = functools.partial(cut.split, num_teams=plan.teams)
  P, stage, part = PartitionSpec, cut.stage, cut.parts
  of_layer = P(stage, None, None, part)
  copies = lambda a: jnp.broadcast_to(a, (cut.num_parts, *a.shape))
  x, sums, outputs = jax.shard_map(
      lambda *args: _stage(layer(rules.inside(cut.manual)), rematerialised, plan, cut, *args),
      mesh=rules.mesh, axis_names=cut.manual, check_vma=False,
      in_specs=(P(stage), P(stage, None, part), P(None, None, part), P(), of_layer,
                P(part, stage)),
      out_specs=(P(stage, None, part), P(stage), of_layer),
  )(jnp.arange(plan.stages), *jax.tree.map(split, (x, rows)), shared,
    jax.tree.map(jax.vmap(split), layer_rows), jax.tree.map(copies, per_layer))
  outputs = jax.tree.map(jax.vmap(cut.join), outputs)
  merge = lambda total, output: output if total is None else total
  return jax.tree.map(cut.join, x), jax.tree.map(merge, sums, outputs, is_leaf=lambda a: a is None)


def _stage(layer, rematerialised, plan, cut, place, x, rows, shared, layer_rows, per_layer):
  """All ticks of one stage.

  Returns:
    The microbatches that it keeps, finished; of its layers' outputs the scalars, and the others.
  """
  S, R, K = plan.stages, plan.turns, plan.teams
  stage = place[0]
  per_layer = jax.tree.map(lambda a: a[0], per_layer)
  deal = functools.partial(_deal, plan, stage, cut.stage)
  grouped = lambda a: deal(a.reshape(R, -1, *a.shape[1:]))
  layer_rows, per_layer = jax.tree.map(grouped, (layer_rows, per_layer))
  group_size = jax.tree.leaves(per_layer)[0].shape[1]
  per_layer = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), per_layer)
  values = jax.lax.stop_gradient(per_layer)

  def exchange(arrived, waiting, tick):
    """What this stage takes up: at stage 0, in the first turn of a team, a new microbatch, for
    which the finished one that arrived waits in its place."""
    team = tick // (R * S) % K
    new, is_new = _at(waiting, team), (stage == 0) & (tick // S % R == 0)
    choose = lambda a, b: jax.tree.map(functools.partial(jnp.where, is_new), a, b)
    left = cut.send(choose(arrived, new), -1)
    return choose(new, arrived), jax.tree.map(lambda a, b: a.at[team].set(b), waiting, left)

  def work(carry, tick):
    here, waiting = exchange(*carry[:2], tick)
    done = jnp.clip(tick - stage, 0, plan.microbatches * R - 1)
    team, turn, member = done // (R * S), done // S % R, done % S
    own = jax.tree.map(lambda a: a[:, member, team], _at(layer_rows, turn))

    @rematerialised
    def one(carry, rows, shared, own_rows, place):
      x, gradients = carry
      own, gradients = _take(values, gradients, place)
      x, output = layer(x, rows, shared, own_rows, own)
      return (x, gradients), output

    places = turn * group_size + jnp.arange(group_size)
    (y, gradients), outputs = jax.lax.scan(
        lambda carry, of_layer: one(carry, _at(_at(rows, member), team), shared, *of_layer),
        (here, carry[2]), (own, places))
    return (cut.send(y, 1), waiting, gradients), outputs

  def own_ticks(a):  # [ticks, layers of a group, ...] -> [layers of the stage, S, K, ...]
    a = jax.lax.dynamic_slice_in_dim(a, stage, plan.microbatches * R)
    a = jnp.moveaxis(a.reshape(K, R, S, *a.shape[1:]), (1, 3, 2, 0), (0, 1, 2, 3))
    return deal(a, back=True).reshape(-1, *a.shape[2:])

  waiting = jax.tree.map(lambda a: a[0], x)
  carry, outputs = jax.lax.scan(work, (_at(waiting, 0), waiting, per_layer),
                                jnp.arange(plan.ticks))
  _, finished = exchange(*carry[:2], plan.ticks)
  finished = jax.tree.map(lambda a: jnp.roll(a, -1, 0)[None], finished)  # waited in the next team
  outputs = jax.tree.map(own_ticks, outputs)
  is_sum = lambda a: a.ndim == 3
  sums = jax.tree.map(lambda a: cut.total(a.sum((1, 2))) if is_sum(a) else None, outputs)
  return finished, sums, jax.tree.map(lambda a: None if is_sum(a) else a, outputs)


def _deal(plan: Schedule, stage: jax.Array, axes: tuple[str, ...], a: jax.Array,
          back: bool = False) -> jax.Array:
  """[R, ...] groups that follow each other in the stack, as parameters are stored, for every S-th
  one, or `back`: R messages, with each of which every stage sends one group and gets one."""
  S, R = plan.stages, plan.turns
  if R == 1:
    return a
  group = np.arange(S * R)
  message = (group + group // math.lcm(R, S)) % R  # all differ that a stage sends, or that it gets
  stored, dealt = np.divmod(group, R), (group % S, group // S)  # stage, place there
  (source, left), (target, right) = (dealt, stored) if back else (stored, dealt)
  leaves, arrives = np.zeros((2, S, R), int)
  leaves[source, message], arrives[target, right] = left, message
  pairs = lambda i: list(zip(source[message == i].tolist(), target[message == i].tolist()))
  parts = [jax.lax.ppermute(a[jnp.asarray(leaves)[stage, i]], axes, pairs(i)) for i in range(R)]
  return jnp.stack(parts)[jnp.asarray(arrives)[stage]]


def _at(tree, index):
  one = lambda a: a[0] if len(a) == 1 else jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
  return jax.tree.map(one, tree)


def _take(tree, gradients, place):
  pairs = jax.tree.map(lambda a, b: (_element(a, b, place) if jnp.issubdtype(a.dtype, jnp.inexact)
                                     else (a[place], b)), tree, gradients)
  return jax.tree.transpose(jax.tree.structure(tree), None, pairs)


def _pick(whole, gradients, place):
  return jax.lax.dynamic_index_in_dim(whole, place, keepdims=False), gradients


@jax.custom_jvp
def _element(whole, gradients, place):
  """Element `place` of `whole`, whose gradient is added to that of `gradients`, which goes on.

  So a loop has the sum of gradients in one place, and adds to one element of it. The gradient of
  `whole` itself would be as large as all of it in each round, and 0 but for that element.
  """
  return _pick(whole, gradients, place)


@_element.defjvp
def _element_jvp(primals, tangents):
  pick = lambda place, tangent: _pick(tangent, tangent, place)
  add = lambda place, gradient: gradient[1].at[place].add(gradient[0])
  return _pick(*primals), jax.custom_derivatives.linear_call(pick, add, primals[2], tangents[1])


def all_but_parameters(primitive: Any, *_, **__) -> bool:
  """What is kept of a layer that rematerialises nothing: else each tick kept its parameters.

  It is the policy of a `jax.checkpoint`: what is only cast or moved is made again.
  """
  return primitive.name not in ('convert_element_type', 'dynamic_slice', 'reshape', 'squeeze',
                                'transpose')


class _Cut:
  """Rows of a batch, of the stages and teams that keep them, and of the devices of a stage.

  stage: mesh axes of the stages.
  parts: those that cut rows and nothing else. Each of their devices works by itself, so that the
    gradients of parameters are summed over them once, behind the last tick.
  manual: both, and axes of one device: kernels then need not be told of them.
  """

  def __init__(self, rules: Rules):
    self.stage, self.shape, rows = axes_of(rules.layers), rules.mesh.shape, axes_of(rules.batch)
    cuts_else = {axis for name in rules.names()
                 if name not in ('batch', 'embed', 'layers', 'opt_embed')
                 for axis in axes_of(getattr(rules, name))}
    self.parts = tuple(axis for axis in rows if axis not in cuts_else.union(self.stage))
    self.manual = {*self.stage, *self.parts, *(axis for axis, n in self.shape.items() if n == 1)}
    self.num_parts = math.prod(self.shape[axis] for axis in self.parts)
    others = tuple(axis for axis in rows if axis not in self.stage + self.parts)
    self._outside = (*rows, *(axis for axis in self.stage if axis not in rows), 'teams')
    self._inside = (*self.stage, 'teams', *self.parts, *others)

  def split(self, a: jax.Array, num_teams: int) -> jax.Array:
    """[B, ...] -> [S, K, B / (S K), ...]; no row goes to another device."""
    a = self._move(a, num_teams, a.shape[1:], self._outside, self._inside)
    return a.reshape(math.prod(self.shape[axis] for axis in self.stage), num_teams, -1,
                     *a.shape[len(self._inside) + 1:])

  def join(self, a: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    rest = a.shape[3:]
    return self._move(a, a.shape[1], rest, self._inside, self._outside).reshape(-1, *rest)

  def _move(self, a, num_teams, rest, source, target):
    sizes = dict(self.shape) | {'teams': num_teams}
    a = a.reshape(*(sizes[axis] for axis in source), -1, *rest)
    return a.transpose(*map(source.index, target), *range(len(source), a.ndim))

  def send(self, tree: Any, by: int) -> Any:
    """To the stage that stands so many behind."""
    S = math.prod(self.shape[axis] for axis in self.stage)
    pairs = [(s, (s + by) % S) for s in range(S)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, self.stage, pairs), tree)

  def total(self, a: jax.Array) -> jax.Array:
    """The sum over the devices of a stage that have other rows."""
    return jax.lax.psum(a, self.parts) if self.parts else a
