"""A stack of equal blocks, one after another.

Parameters are kept as one tree with a leading `layers` axis whether the stack is scanned or
unrolled, so a checkpoint does not depend on how it is run.
"""
from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lm.errors import UserError
from lm.parallel import pipeline
from lm.parallel.rules import Rules
from pallas_kernels.dropout import Draws

# 'none', 'full', 'dots', or names of NAMED with + between them; one with @host is kept there.
Remat = str
POLICIES = {'full': jax.checkpoint_policies.nothing_saveable,
            'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            'none': pipeline.all_but_parameters}
# What blocks name: queries, keys and values; what the attention kernel returns, and its projection;
# the feed-forward layer before its activation, and its result. Other names are for
# `lm/training/probe.py` alone.
NAMED = ('qkv', 'attention', 'attention_out', 'mlp_in', 'mlp_out')


def policy(remat: Remat) -> Callable[..., Any]:
  """What a backward pass finds instead of computing it again.

  Example, for a third fewer products than 'full': 'qkv+attention+attention_out+mlp_in@host'.

  Raises:
    UserError: it names what no block names.
  """
  if remat in POLICIES:
    return POLICIES[remat]
  names = remat.split('+')
  unknown = [name for name in names if name.removesuffix('@host') not in NAMED]
  if unknown:
    raise UserError(f"remat={remat!r} names {unknown[0]!r}; write 'none', 'full', 'dots', or of "
                    f'{", ".join(NAMED)} those to keep with + between them, @host behind what goes '
                    "to the host's memory")
  kept, offloaded = ([name.removesuffix('@host') for name in names
                      if name.endswith('@host') == is_host] for is_host in (False, True))
  if not offloaded:
    return jax.checkpoint_policies.save_only_these_names(*kept)
  return jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=kept, names_which_can_be_offloaded=offloaded, offload_src='device',
      offload_dst='pinned_host')


def unstack(tree: Any) -> list[Any]:
  """[L, ...] leaves -> L trees; a list of L trees stays as it is.

  One split, whose gradient is one concatenation (indexing's is L sums).
  """
  if isinstance(tree, list):
    return tree
  leaves, treedef = jax.tree.flatten(tree)
  parts = [jnp.unstack(leaf) for leaf in leaves]
  return [treedef.unflatten(layer) for layer in zip(*parts)]


def first_layers(tree: Any, num_layers: int) -> Any:
  """The first of [L, ...] leaves, or of a list of L trees.

  Raises:
    UserError: there are not so many.
  """
  L = len(tree) if isinstance(tree, list) else len(jax.tree.leaves(tree)[0])
  if not 1 <= num_layers < L:
    raise UserError(f'num_layers={num_layers} of a draft must be 1 to {L - 1}: fewer than the '
                    f'{L} of the model')
  cut = lambda x: x[:num_layers]
  return cut(tree) if isinstance(tree, list) else jax.tree.map(cut, tree)


def _on_device(x):
  """A parameter that stands in the host's memory (`pinned_host`) comes to the device for its layer
  alone: in a scan no more than two layers are there at a time."""
  is_away = getattr(jax.typeof(x), 'memory_space', None) == jax.memory.Space.Host
  return jax.device_put(x, jax.memory.Space.Device) if is_away else x


class Stack(nn.Module):
  """x -> block_L(...block_1(x)), each with its own parameters.

  block: makes one block from the rules of where it runs: a module, called as
    `block(x, rows, shared, own_rows, own, draws) -> (x, output)`.
  scan: one compiled block in a loop (compile time does not grow with depth) or unrolled (on a CPU
    a quarter faster, since a loop copies each layer's parameters and residuals).
  remat: what the backward pass recomputes: nothing, all of a block, all but its matrix products, or
    all but what is named (`policy`).
  drop_rate: the probability that a layer is left out, where draws are given (LayerDrop,
    arXiv:1909.11556, section 3.1).
  rules: devices over which they cut the layers are the stages of a pipeline.
  """
  block: Callable[[Rules], nn.Module]
  num_layers: int
  scan: bool
  remat: Remat
  drop_rate: float = 0.0
  rules: Rules = Rules()

  @nn.compact
  def __call__(self, x: Any, rows: Any, shared: Any, layer_rows: Any, per_layer: tuple[Any, ...],
               draws: Draws | None = None) -> tuple[Any, Any]:
    """x, an array or a tree of them, goes from block to block.

    An unrolled stack also takes its parameters, `layer_rows` and any member of `per_layer` as a
    list of L trees: a loop that calls it again and again then slices and stacks nothing.

    Args:
      x: leaves [B, ...].
      rows: leaves [B, ...] of the same rows, for every block.
      shared: what has no rows, for every block.
      layer_rows: leaves [L, B, ...], a slice for each.
      per_layer: leaves [L, ...] without rows, a slice for each.
      draws: turns dropout on: each block gets its own.

    Returns:
      The last x, and the blocks' second results: stacked on a leading axis if scanned, else a list.
      A leaf of one has rows, or it is a scalar, a sum over them.
    """
    def init(rng):
      if self._has_stages:
        pipeline.check_layers(self.rules, self.num_layers)
      first = lambda tree: unstack(tree)[0] if jax.tree.leaves(tree) else None
      block, one = self.block(self.rules), (first(layer_rows), tuple(map(first, per_layer)))
      rngs = jax.random.split(rng, self.num_layers)
      stacked = jax.vmap(lambda r: block.init(r, x, rows, shared, *one, None)['params'])(rngs)
      return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})

    if self.is_initializing():
      params = self.param('layers', init)
    else:  # `param` would trace all of `init` again, to compare shapes
      params = self.get_variable('params', 'layers')

    kept = None
    if draws is not None and self.drop_rate > 0:
      kept = draws.kept_layers(self.drop_rate, self.num_layers)
    rows = rows, None if draws is None else dataclasses.replace(draws, batch=None)
    index = None if draws is None else jnp.arange(self.num_layers)
    layers = params, *per_layer, index, kept
    if self._has_stages and self._fills_stages(x, (layer_rows, *layers)):
      x, outputs = pipeline.run(self._apply, self._rematerialised, self.rules, x, rows, shared,
                                layer_rows, layers)
      return x, outputs if self.scan else self._each(outputs)
    if self.scan:
      return self._scan(self.rules, x, rows, shared, layer_rows, layers)

    apply = jax.jit(self._rematerialised(self._apply(self.rules)))  # traced once for all layers
    outputs = []
    for own_rows, *own in zip(self._each(layer_rows), *map(self._each, layers)):
      x, output = apply(x, rows, shared, own_rows, tuple(own))
      outputs.append(output)
    return x, outputs

  @property
  def is_uniform(self) -> bool:
    """Whether one program runs for every layer, so that none can differ from the others."""
    return self.scan or self._has_stages

  @property
  def _has_stages(self):
    return self.rules.shards('layers') > 1

  def _fills_stages(self, x, layers):
    """Whether each device has a row at least, and layers are no lists: not so in decoding, which
    takes every layer by itself."""
    is_list = any(isinstance(tree, list) for tree in layers)
    return not is_list and len(jax.tree.leaves(x)[0]) >= self.rules.shards('batch')

  def _each(self, tree):
    return unstack(tree) if jax.tree.leaves(tree) else [tree] * self.num_layers

  def _apply(self, rules):
    """(x, (rows, draws), shared, own rows, (params, *own, index, kept)) -> (x, output) of one
    block."""
    block = self.block(rules)

    def apply(x, rows, shared, own_rows, layer):
      params, *own, index, kept = layer
      params = jax.tree.map(_on_device, params)
      rows, draws = rows
      y, output = block.apply({'params': params}, x, rows, shared, own_rows, tuple(own),
                              None if draws is None else draws.fold(index))
      y = jax.tree.map(lambda a: checkpoint_name(a, 'residual'), y)
      return y if kept is None else jax.tree.map(functools.partial(jnp.where, kept), y, x), output

    return apply

  def _rematerialised(self, apply):
    if self.remat == 'none' and not self._has_stages:
      return apply
    return jax.checkpoint(apply, policy=policy(self.remat), prevent_cse=not self.is_uniform)

  def _scan(self, rules, x, rows, shared, layer_rows, layers):
    apply = self._rematerialised(self._apply(rules))
    return jax.lax.scan(lambda x, one: apply(x, rows, shared, *one), x, (layer_rows, layers))
