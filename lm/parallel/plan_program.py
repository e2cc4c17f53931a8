"""A traced train step as what one device holds, computes and exchanges, without a compiler.

`read` walks the equations of a traced program once: every value gets the mesh axes that cut each of
its axes, as the constraints and the maps over devices in it say and its operations carry on.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core

from lm.parallel.rules import axes_of

Axes = tuple[str, ...]
_COLLECTIVES = {'all_gather': 'all-gather', 'reduce_scatter': 'reduce-scatter',
                'psum': 'all-reduce', 'pmax': 'all-reduce', 'psum_invariant': 'all-reduce',
                'ppermute': 'collective-permute', 'all_to_all': 'all-to-all',
                'ragged_all_to_all': 'ragged-all-to-all'}
_WRAPPERS = ('jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint',
             'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr', 'custom_lin')
_ELEMENTWISE = ('add', 'add_any', 'sub', 'mul', 'div', 'select_n', 'convert_element_type', 'neg',
                'square', 'integer_pow', 'sqrt', 'max', 'min')


@dataclasses.dataclass(eq=False)
class Value:
  """An array: its shape (within a map over devices that of a part), and per axis the mesh axes that
  cut it.  partial: mesh axes over which it is a sum of parts not yet summed.  is_empty: nothing
  that the platform of the program ever fills.  origin: the loop's result of which this is made,
  element by element."""
  shape: tuple[int, ...]
  itemsize: int
  cut: tuple[Axes, ...]
  is_part: bool
  mesh: Mapping[str, int]
  partial: frozenset[str] = frozenset()
  is_empty: bool = False
  origin: 'Value | None' = None

  @property
  def num_elements(self) -> int:
    """Of the whole, or within a map of the part."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """On one device of the traced mesh."""
    if self.is_empty:
      return 0
    parts = 1 if self.is_part else math.prod(self.mesh[a] for axes in self.cut for a in axes)
    return self.num_elements * self.itemsize // parts


@dataclasses.dataclass(eq=False)
class Op:
  """An operation.  flops: of the part of a device in the traced mesh.  elements: of a kernel, that
  all but its products go through.  moved: (collective, axes) of those that it is, of whose result a
  device keeps one of `parts`.  body: of a loop, of `times`
  turns, behind whose `num_consts` inputs come `num_carry` that it carries."""
  name: str
  ins: list[Value]
  outs: list[Value]
  flops: float = 0.0
  elements: float = 0.0
  moved: tuple[str, Axes] | None = None
  body: 'Program | None' = None
  times: int = 1
  parts: int = 1
  num_consts: int = 0
  num_carry: int = 0


@dataclasses.dataclass(eq=False)
class Program:
  """Operations in order, with what comes in and goes out."""
  ins: list[Value]
  outs: list[Value]
  ops: list[Op]


class _Reader:
  """Walks equations; `mesh` has the sizes of the traced mesh."""

  def __init__(self, mesh: Mapping[str, int], platform: str):
    self.mesh, self.platform = mesh, platform
    self.loops = {}  # a loop's result -> (the loop, its place)
    self.seen = {}  # (operation, what it reads) -> its result: the compiler computes it once

  def value(self, aval, cut=None, is_part=False, **kwargs) -> Value:
    shape = tuple(getattr(aval, 'shape', ()))
    dtype = getattr(aval, 'dtype', None)
    itemsize = 0 if dtype is None or dtype == jax.dtypes.float0 else (
        8 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else dtype.itemsize)
    return Value(shape, itemsize, cut or ((),) * len(shape), is_part, self.mesh, **kwargs)

  def program(self, jaxpr, ins: Sequence[Value], consts: Sequence[Value], is_part: bool) -> Program:
    env, ops = {}, []
    env.update(zip(jaxpr.invars, ins))
    env.update(zip(jaxpr.constvars, consts))
    self._equations(jaxpr, env, ops, is_part)
    return Program(list(ins), [self._get(env, v, is_part) for v in jaxpr.outvars], ops)

  def _get(self, env, atom, is_part):
    if isinstance(atom, core.Literal):
      return self.value(atom.aval, is_part=is_part)
    return env[atom]

  def _equations(self, jaxpr, env, ops, is_part):
    for eqn in jaxpr.eqns:
      ins = [self._get(env, v, is_part) for v in eqn.invars]
      outs = self._equation(eqn, ins, ops, is_part)
      for var, out in zip(eqn.outvars, outs):
        env[var] = out

  def _inline(self, jaxpr, ins, ops, is_part):
    consts = [self.value(jax.typeof(c), is_part=is_part) for c in getattr(jaxpr, 'consts', ())]
    inner, env = getattr(jaxpr, 'jaxpr', jaxpr), {}
    env.update(zip(inner.invars, ins))
    env.update(zip(inner.constvars, consts))
    self._equations(inner, env, ops, is_part)
    return [self._get(env, v, is_part) for v in inner.outvars]

  def _equation(self, eqn, ins, ops, is_part) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in _WRAPPERS or 'call_jaxpr' in params or (
        name not in ('scan', 'while', 'cond', 'shard_map', 'pallas_call') and 'jaxpr' in params):
      jaxpr = params.get('call_jaxpr') or params.get('jaxpr') or params.get('fun_jaxpr')
      return self._inline(jaxpr, ins, ops, is_part)
    if name == 'cond':
      return self._inline(self._branch(params), ins[1:], ops, is_part)
    if name == 'shard_map':
      return self._map(eqn, ins, ops)
    if name == 'scan':
      return self._scan(eqn, ins, ops, is_part)
    outs = [self.value(v.aval, is_part=is_part) for v in eqn.outvars]
    if name not in ('convert_element_type', 'reshape', 'transpose'):
      return self._apply(eqn, name, ins, outs, ops)
    key = name, ins[0], outs[0].shape, outs[0].itemsize, params.get('permutation')
    if key not in self.seen:
      self.seen[key] = self._apply(eqn, name, ins, outs, ops)
    return self.seen[key]

  def _branch(self, params):
    """The branch of the platform; of a choice by data the one with the most equations."""
    platforms = params.get('branches_platforms')
    if platforms:
      own = [i for i, names in enumerate(platforms) if names and self.platform in names]
      index = own[0] if own else next(i for i, names in enumerate(platforms) if names is None)
      return params['branches'][index]
    return max(params['branches'], key=lambda branch: len(branch.jaxpr.eqns))

  def _map(self, eqn, ins, ops):
    """shard_map: parts come in, and parts go out as wholes."""
    params = eqn.params
    inner = []
    for v, x, spec in zip(params['jaxpr'].invars, ins, params['in_specs']):
      cut = _cut_of(spec, len(x.shape))
      x = self._reshard(x, cut, ops) if not x.is_part else x
      part = self.value(v.aval, cut, True, is_empty=x.is_empty)
      ops.append(Op('reshape', [x], [part]))
      inner.append(part)
    outs = self._inline(params['jaxpr'], inner, ops, True)
    whole = []
    for v, x, spec in zip(eqn.outvars, outs, params['out_specs']):
      out = self.value(v.aval, _cut_of(spec, len(v.aval.shape)), is_empty=x.is_empty)
      ops.append(Op('reshape', [x], [out]))
      whole.append(out)
    return whole

  def _reshard(self, x: Value, cut, ops) -> Value:
    """x in another sharding: gathered, scattered, or cut."""
    if (x, cut) in self.seen:
      return self.seen[x, cut]
    self.seen[x, cut] = out = self._moved(x, cut, ops)
    return out

  def _moved(self, x, cut, ops):
    """The operation that does it; a sum over axes that the sharding does not name waits."""
    had, has = self._axes(x.cut), self._axes(cut)
    scattered = x.partial & has - had
    out = dataclasses.replace(x, cut=cut, partial=x.partial - has if scattered else frozenset())
    ops.append(Op('sharding_constraint', [x], [out]))
    if x.partial:
      kind, axes = ('reduce-scatter', scattered) if scattered else ('all-reduce', x.partial)
    elif had - has:
      kind, axes = 'all-gather', had - has
    else:
      moves = any(self._axes([a]) != self._axes([b]) for a, b in zip(x.cut, cut))
      kind, axes = 'all-to-all', had if had == has and moves else ()
    if axes:
      ops[-1].moved = kind, tuple(axis for axis in self.mesh if axis in axes)
    return out

  def _axes(self, cut) -> frozenset[str]:
    """The mesh axes of more than one device that cut an array."""
    return frozenset(a for axes in cut for a in axes if self.mesh[a] > 1)

  def _scan(self, eqn, ins, ops, is_part):
    params = eqn.params
    nc, nk = params['num_consts'], params['num_carry']
    inner = [dataclasses.replace(x) for x in ins[:nc + nk]]
    for x in ins[nc + nk:]:
      inner.append(dataclasses.replace(x, shape=x.shape[1:], cut=x.cut[1:]))
    jaxpr = params['jaxpr']
    consts = [self.value(jax.typeof(c), is_part=is_part) for c in jaxpr.consts]
    body = self.program(jaxpr.jaxpr, inner, consts, is_part)
    carried = list(zip(inner[nc:nc + nk], body.outs))
    if any(self._axes(x.cut) < self._axes(y.cut) for x, y in carried):  # zeros, to begin with
      for x, y in carried:
        x.cut = y.cut if self._axes(x.cut) < self._axes(y.cut) else x.cut
      body = self.program(jaxpr.jaxpr, inner, consts, is_part)
    for x, y in zip(ins[nc:nc + nk], body.ins[nc:nc + nk]):
      x.cut = y.cut
    outs = []
    for i, (v, x) in enumerate(zip(eqn.outvars, body.outs)):
      cut = x.cut if i < nk else ((), *x.cut)
      outs.append(Value(tuple(v.aval.shape), x.itemsize, cut, is_part, self.mesh, x.partial,
                        x.is_empty))
    ops.append(Op('scan', list(ins), outs, body=body, times=params['length'], num_consts=nc,
                  num_carry=nk))
    for i, out in enumerate(outs):
      out.origin, self.loops[out] = out, (ops[-1], i)
    return outs

  def _join(self, ins, out):
    """An operation on each element of several arrays has the sharding of the one that is cut most,
    and the compiler gives it to the loop that makes another, such as a gradient."""
    same = [x for x in ins if x.shape == out.shape and not x.is_part]
    most = max((x.cut for x in same), key=lambda cut: len(self._axes(cut)), default=())
    for x in same:
      if x.origin is not None and self._axes(x.cut) < self._axes(most):
        self._adopt(x.origin, most)
    if same:
      out.cut, out.origin = most, next((x.origin for x in same if x.origin is not None), None)

  def _adopt(self, x: Value, cut):
    """Gives a loop's result another sharding: its sums are then scattered in the loop."""
    (loop, i), x.cut = self.loops[x], cut
    inner = loop.body.outs[i]
    if i >= loop.num_carry:
      cut = cut[1:]
    else:
      loop.body.ins[loop.num_consts + i].cut = loop.ins[loop.num_consts + i].cut = cut
      if inner.origin is not None and self._axes(inner.origin.cut) < self._axes(cut):
        self._adopt(inner.origin, cut)
    makers = {y: op for op in loop.body.ops for y in op.outs}
    y = inner
    while y in makers and len(makers[y].ins) == 1 and not makers[y].moved:
      y = makers[y].ins[0]
    if y in makers and makers[y].moved and makers[y].moved[0] == 'all-reduce':
      makers[y].moved = 'reduce-scatter', makers[y].moved[1]
      makers[y].parts = math.prod(self.mesh[a] for a in self._axes(cut) - self._axes(inner.cut))
    loop.body.outs[i] = dataclasses.replace(inner, cut=cut, partial=frozenset())
    loop.body.ops.append(Op('sharding_constraint', [inner], [loop.body.outs[i]]))

  def _apply(self, eqn, name, ins, outs, ops):
    params, op = eqn.params, Op(name, ins, outs)
    if name == 'sharding_constraint':
      x = dataclasses.replace(ins[0])
      spec = params['sharding'].spec
      return [self._reshard(ins[0], _cut_of(spec, len(x.shape)), ops)]
    if name in _COLLECTIVES:
      axes = params.get('axes') or params.get('axis_name')
      axes = tuple(a for a in axes_of(axes) if isinstance(a, str)) if axes else ()
      op.moved = (_COLLECTIVES[name], axes)
    for out in outs:
      out.cut = _carry(name, params, ins, out)
      out.partial = frozenset().union(*(x.partial for x in ins)) if name in (
          'add', 'add_any', 'convert_element_type', 'reshape', 'mul', 'transpose', 'squeeze',
          'broadcast_in_dim', 'neg', 'reduce_sum', 'sub', 'name', 'optimization_barrier') else (
              frozenset())
      out.is_empty = name == 'empty2' or bool(ins) and all(x.is_empty for x in ins)
    if len(outs) == 1 and name in _ELEMENTWISE and not outs[0].is_part:
      self._join(ins, outs[0])
    if name == 'optimization_barrier':
      for x, out in zip(ins, outs):
        out.cut, out.partial = x.cut, x.partial
    if name == 'all_gather' or name == 'reduce_scatter' or name == 'all_to_all':
      outs[0].cut = _collective_cut(name, params, ins[0], op.moved[1])
    if name == 'dot_general':
      op.flops = self._dot(params, ins, outs[0])
    if name == 'pallas_call':
      op.flops, op.elements = _kernel_work(params)
    if name.startswith('ragged_dot'):
      op.flops = 2.0 * math.prod(ins[0].shape) * outs[0].shape[-1] / self._parts(ins[0])
    if name in ('reduce_sum', 'reduce_max'):
      outs[0].partial |= self._axes([ins[0].cut[i] for i in params['axes']])
    if name in ('scatter-add', 'scatter_add') and not ins[0].is_part:
      outs[0].partial |= self._axes(ins[2].cut[:1])
    ops.append(op)
    return outs

  def _parts(self, x):
    return 1 if x.is_part else math.prod(self.mesh[a] for axes in x.cut for a in axes)

  def _dot(self, params, ins, out):
    (lc, rc), (lb, rb) = params['dimension_numbers']
    x, y = ins
    free = lambda v, used: [i for i in range(len(v.shape)) if i not in used]
    cut = [x.cut[i] for i in lb] + [x.cut[i] for i in free(x, (*lc, *lb))]
    used = {a for axes in cut for a in axes}
    cut += [tuple(a for a in y.cut[i] if a not in used) for i in free(y, (*rc, *rb))]
    out.cut = tuple(cut)
    summed = {a for i, j in zip(lc, rc) for a in (*x.cut[i], *y.cut[j])}
    used = {a for axes in cut for a in axes}
    if not out.is_part:
      out.partial = frozenset(a for a in summed - used if self.mesh[a] > 1)
    size = math.prod(x.shape[i] for i in lc)
    flops = 2.0 * math.prod(out.shape) * size
    return flops if out.is_part else flops / math.prod(self.mesh[a] for a in used | summed)


def _kernel_work(params) -> tuple[float, float]:
  """FLOPs of the products of a kernel and elements of its other results, in every step of its
  grid."""
  steps = math.prod(size for size in params['grid_mapping'].grid if isinstance(size, int))
  flops, elements = _work_in(params['jaxpr'])
  return float(steps * flops), float(steps * elements)


def _work_in(jaxpr) -> tuple[float, float]:
  flops = elements = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      size = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      flops += 2.0 * math.prod(eqn.outvars[0].aval.shape) * size
      continue
    if eqn.primitive.name == 'cond':
      inner = [max(_work_in(branch.jaxpr) for branch in eqn.params['branches'])]
    else:
      inner = [_work_in(getattr(x, 'jaxpr', x)) for x in core.jaxprs_in_params(eqn.params)]
    if not inner:
      elements += max(math.prod(getattr(x.aval, 'shape', ())) for x in (
          *eqn.invars, *eqn.outvars)) if eqn.outvars else 0
    turns = eqn.params.get('length', 1)
    flops, elements = (total + turns * sum(part) for total, part in zip(
        (flops, elements), zip(*inner or [(0.0, 0.0)])))
  return flops, elements


def _cut_of(spec, rank) -> tuple[Axes, ...]:
  cut = tuple(axes_of(axes) for axes in spec)
  return cut + ((),) * (rank - len(cut))


def _collective_cut(name, params, x, axes):
  cut = list(x.cut)
  if name == 'all_gather':
    i = params['all_gather_dimension']
    if not params['tiled']:
      return tuple(cut[:i] + [()] + cut[i:])
    cut[i] = tuple(a for a in cut[i] if a not in axes)
  elif name == 'reduce_scatter':
    i = params['scatter_dimension']
    if not params['tiled']:
      return tuple(cut[:i] + cut[i + 1:])
    cut[i] = (*cut[i], *axes)
  else:
    i, j = params['split_axis'], params['concat_axis']
    if not params['tiled']:
      del cut[i]
      return tuple(cut[:j] + [()] + cut[j:])
    cut[j] = tuple(a for a in cut[j] if a not in axes)
    cut[i] = (*cut[i], *axes)
  return tuple(cut)


def _carry(name, params, ins, out) -> tuple[Axes, ...]:
  """Mesh axes of each axis of a result, from those of its operands."""
  rank = len(out.shape)
  if not ins:
    return ((),) * rank
  first = ins[0]
  if name == 'broadcast_in_dim':
    cut = [()] * rank
    for i, j in enumerate(params['broadcast_dimensions']):
      if first.shape[i] == out.shape[j]:
        cut[j] = first.cut[i]
    return tuple(cut)
  if name == 'transpose':
    return tuple(first.cut[i] for i in params['permutation'])
  if name == 'reshape':
    return _reshaped(first, out.shape)
  if name in ('squeeze', 'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_or', 'reduce_and',
              'argmax', 'argmin', 'reduce_prod'):
    gone = params.get('dimensions', params.get('axes'))
    gone = {i % len(first.shape) for i in gone}
    return tuple(axes for i, axes in enumerate(first.cut) if i not in gone)
  if name == 'gather':
    return _gathered(params, ins, rank)
  cut = []
  for i in range(rank):
    found = [x.cut[i] for x in ins if len(x.shape) == rank and x.cut[i]
             and (x.shape[i] == out.shape[i] or len(ins) == 1 or name in ('pad', 'dynamic_slice'))]
    if not found and name in ('pallas_call', 'ragged_dot', 'ragged_dot_general'):
      found = [x.cut[j] for x in ins for j in range(len(x.shape))
               if x.shape[j] == out.shape[i] and x.cut[j]]
    cut.append(found[0] if found else ())
  return _once(cut)


def _once(cut):
  """Each mesh axis once."""
  seen, out = set(), []
  for axes in cut:
    out.append(tuple(a for a in axes if a not in seen))
    seen.update(axes)
  return tuple(out)


def _gathered(params, ins, rank):
  numbers = params['dimension_numbers']
  operand, indices = ins[:2]
  offset = set(numbers.offset_dims)
  kept = iter([operand.cut[i] for i in range(len(operand.shape))
               if i not in numbers.collapsed_slice_dims and i not in
               getattr(numbers, 'operand_batching_dims', ())])
  rows = iter(indices.cut[:-1])
  return _once([next(kept, ()) if i in offset else next(rows, ()) for i in range(rank)])


def _reshaped(x: Value, shape) -> tuple[Axes, ...]:
  """Axes of a reshape: merged ones join, and the first of those that are split has them."""
  cut, i = [()] * len(shape), 0
  j = 0
  while i < len(x.shape) and j < len(shape):
    a, b, i0, j0 = x.shape[i], shape[j], i, j
    while a != b:
      if a < b:
        i += 1
        if i >= len(x.shape):
          return tuple(cut)
        a *= x.shape[i]
      else:
        j += 1
        if j >= len(shape):
          return tuple(cut)
        b *= shape[j]
    group = tuple(axis for k in range(i0, i + 1) for axis in x.cut[k])
    target = next((k for k in range(j0, j + 1) if shape[k] > 1), j0)
    cut[target] = group
    i, j = i + 1, j + 1
  return tuple(cut)


def read(traced: Any, arguments: Sequence[jax.ShapeDtypeStruct], mesh: Mapping[str, int],
         platform: str) -> Program:
  """The program of a traced function (`jax.make_jaxpr`) on one device.

  Args:
    arguments: with shardings over the mesh.
    mesh: sizes of its axes.
    platform: of the branches that are chosen when a program is lowered.
  """
  reader = _Reader(mesh, platform)
  ins = [reader.value(x, _cut_of(x.sharding.spec, len(x.shape))) for x in arguments]
  consts = [reader.value(jax.typeof(x)) for x in traced.consts]
  return reader.program(traced.jaxpr, ins, consts, False)
