"""When each array of a traced program is in a device's memory, and the most that is there at once.

What the compiler does is imitated: a result of a product, a kernel, a loop, an exchange or a sum is
an array; elementwise operations and casts belong to what reads them, or where that is much later to
what made their operands; loops carry in place and write rows of stacks in place; casts of
parameters to the dtype of products are made for all layers at once, before the loops.
"""
from collections.abc import Mapping, Sequence
import collections
import dataclasses
import math

import numpy as np

from lm.parallel.plan_program import Op, Program, Value

_VIEWS = {'reshape', 'squeeze', 'expand_dims', 'name', 'stop_gradient', 'copy', 'copy_p', 'split',
          'optimization_barrier', 'reduce_precision', 'pvary', 'mesh_cast', 'reshard'}
_CHEAP = {'convert_element_type', 'broadcast_in_dim', 'iota', 'transpose', 'slice', 'pad', 'rev',
          'dynamic_slice', 'tile'}
_ARRAYS = {'dot_general', 'pallas_call', 'gather', 'scatter-add', 'scatter_add', 'scatter', 'sort',
           'top_k', 'cumsum', 'argmax', 'concatenate', 'ragged_dot_general', 'ragged_dot', 'scan',
           'while', 'dynamic_update_slice'}
SCATTER, DELAY = 1, 2  # products later, of what is scattered, and of what results alone need
WINDOWED_FROM = 8  # devices
_PRODUCTS = {'dot_general', 'pallas_call', 'ragged_dot_general', 'ragged_dot'}


@dataclasses.dataclass(frozen=True)
class Lifetimes:
  """Arrays of a program, each with the first and the last operation at which it is in memory.

  loops: (operation, lifetimes within one turn).
  """
  values: list[Value]
  births: np.ndarray
  deaths: np.ndarray
  num_ops: int
  loops: list[tuple[int, 'Lifetimes']]

  def peak(self, bytes_of=lambda value: value.bytes) -> float:
    """The most bytes at once, with those of a loop while it runs."""
    levels = self._levels(bytes_of)
    return float(levels.max(initial=0))

  def at_peak(self, smallest: int = 2**24) -> list[tuple[float, Value]]:
    """The arrays of at least so many bytes at the peak, and those of the loop that runs then."""
    levels = self._levels(lambda value: value.bytes)
    at = int(levels.argmax())
    found = [(x.bytes, x) for x, b, d in zip(self.values, self.births, self.deaths)
             if b <= at <= d and x.bytes >= smallest]
    inner = [row for time, loop in self.loops if time == at for row in loop.at_peak(smallest)]
    return sorted(found + inner, key=lambda row: -row[0])

  def _levels(self, bytes_of):
    change = np.zeros(self.num_ops + 2)
    sizes = np.array([bytes_of(value) for value in self.values], float)
    np.add.at(change, self.births, sizes)
    np.add.at(change, self.deaths + 1, -sizes)
    levels = np.cumsum(change)[:self.num_ops + 1]
    for time, loop in self.loops:
      levels[time] += loop.peak(bytes_of)
    return levels


def lifetimes(program: Program) -> Lifetimes:
  """Those of a whole program; its inputs are the caller's, and results take their place."""
  return _Analysis(program, [True] * len(program.outs)).result()


class _Analysis:
  """Of one program: the main one, or the body of a loop. Behind `num_consts` inputs it has
  `num_carry` whose buffers are its own, and as many results; other results are written in place."""

  def __init__(self, program: Program, used: Sequence[bool], num_consts: int = 0,
               num_carry: int = 0):
    self.program = program
    self.carried = program.ins[num_consts:num_consts + num_carry]
    self.outs = [x for x, is_used in zip(program.outs, used) if is_used]
    self.rows = set(program.outs[num_carry:])
    self.carried_out = set(program.outs[:num_carry])
    self.ops, self.live = live_ops(program, used)
    self.ops = _late(self.ops)
    self.maker = {x: op for op in self.ops for x in op.outs}
    self.users = collections.defaultdict(list)
    self.when = {op: time for time, op in enumerate(self.ops)}
    for op in self.ops:
      for x in set(op.ins):
        self.users[x].append(op)
    self.arrays = set()
    self.hoisted, self.copies = self._hoisted(), []

  def result(self) -> Lifetimes:
    self._products()
    self._needed_whole()
    self._kept()
    return self._times()

  # What is an array.

  def _hoisted(self) -> list[tuple[Value, int, int]]:
    """Casts of stacked parameters in loops, made once before them: (array, first, last loop)."""
    found = {}
    for time, op in enumerate(self.ops):
      if op.name != 'scan':
        continue
      for stack, itemsize in _casts(op):
        source = self._source(stack)
        if source in self.program.ins:
          first = found.get((source, itemsize), (None, time, time))[1]
          value = dataclasses.replace(source, itemsize=itemsize)
          found[source, itemsize] = (value, first, time)
    return list(found.values())

  def _source(self, x: Value) -> Value:
    """What x is a view, or a copy, of."""
    return _source(self.maker, x)

  def _products(self):
    """Marks what operations make; a product's, sum's or exchange's cast is made with it."""
    for op in self.ops:
      is_sum = op.name.startswith('reduce_')
      if not (op.name in _ARRAYS or op.moved or is_sum):
        continue
      for x in op.outs:
        self.arrays.add(self._with_what_follows(op, x))

  def _with_what_follows(self, op, x):
    """The array that stands for x: the last of elementwise operations on it alone that fit it."""
    if op.name in ('scan', 'pallas_call'):
      return x
    y = x
    while len(self.users[y]) == 1 and y not in self.outs:
      user = self.users[y][0]
      casts = user.name == 'convert_element_type'
      if not casts and (op.name != 'dot_general' or not _is_elementwise(user)):
        break
      z = user.outs[0]
      if len(user.outs) != 1 or z.bytes > x.bytes or z.num_elements != x.num_elements:
        break
      y = z
    return y

  def _needed_whole(self):
    """Marks operands of kernels, loops, exchanges and barriers, what several products read, results
    of the program, and transposed arrays."""
    for op in self.ops:
      if op.name in ('pallas_call', 'scan', 'optimization_barrier') or op.moved:
        for x in op.ins:
          self._mark(x)
    for x in self.outs:
      if x not in self.rows:
        self._mark(x)
    for op in self.ops:
      if op.name == 'transpose' and self._source(op.ins[0]) in self.maker:
        if self.maker[self._source(op.ins[0])].name == 'scan':
          self.arrays.add(op.outs[0])
    readers = collections.Counter()
    for op in self.ops:
      if op.name in _PRODUCTS:
        readers.update({self._source(x) for x in op.ins})
    for x, count in readers.items():
      if count > 1 and x in self.maker and _is_elementwise(self.maker[x]):
        self.arrays.add(x)

  def _mark(self, x):
    x = self._source(x)
    if x in self.maker:
      self.arrays.add(x)

  def _kept(self):
    """Marks what is read on both sides of a loop: it is not computed again behind it."""
    loops = [time for time, op in enumerate(self.ops) if op.name == 'scan']
    for op in self.ops:
      if op.name in ('iota', 'broadcast_in_dim') or not _is_elementwise(op):
        continue
      for x in op.outs:
        last = max((self.when[user] for user in self.users[x]), default=-1)
        grows = op.name == 'convert_element_type' and x.itemsize >= op.ins[0].itemsize
        if not grows and any(self.when[op] < time < last for time in loops):
          self.arrays.add(self._narrowest(x))

  def _narrowest(self, x: Value) -> Value:
    """The smallest of what x is computed from, element by element, beside smaller arrays: a norm is
    computed again from what it normalises."""
    best, size = x, x.num_elements
    while x in self.maker and _is_elementwise(self.maker[x]):
      large = {self._source(y) for y in self.maker[x].ins if y.num_elements == size}
      large = {y for y in large if not self._is_of_smaller(y)}
      if len(large) != 1:
        break
      x = large.pop()
      best = x if x.bytes < best.bytes else best
    return best

  def _is_of_smaller(self, x: Value) -> bool:
    op = self.maker.get(x)
    return op is not None and _is_elementwise(op) and all(
        y.num_elements < x.num_elements for y in op.ins)

  # From when to when.

  def _times(self) -> Lifetimes:
    births, deaths, loops = {x: 0 for x in self.carried}, {}, []
    roots = {x: {x} for x in self.program.ins}
    for time, op in enumerate(self.ops):
      read = set().union(*(roots.get(x, ()) for x in op.ins))
      for i, x in enumerate(op.outs):
        source = self._source(x)
        if x in self.arrays and source is x and not x.is_empty:
          roots[x], births[x] = {x}, time
        else:
          roots[x] = roots.get(source, set()) if source is not x else read
      if op.name == 'scan':
        self._loop(time, op, roots, births, deaths, loops)
      elif any(roots[x] == {x} for x in op.outs):
        for x in read:
          deaths[x] = time
    self._end(roots, births, deaths)
    self._reuse(births, deaths)
    self._overlap(roots, births, deaths)
    pairs = [(x, births[x], max(deaths.get(x, births[x]), births[x] - 1)) for x in births]
    pairs += self.hoisted + self.copies
    values, first, last = zip(*pairs) if pairs else ((), (), ())
    return Lifetimes(list(values), np.array(first, int), np.array(last, int), len(self.ops), loops)

  def _loop(self, time, op, roots, births, deaths, loops):
    """What a loop carries is its own while it runs, and what it stacks is there from its start."""
    carry = slice(op.num_consts, op.num_consts + op.num_carry)
    for i, x in enumerate(op.ins):
      is_carried = carry.start <= i < carry.stop
      for root in roots.get(x, ()):
        deaths[root] = max(deaths.get(root, -1), time - is_carried)
    for x in op.outs[:op.num_carry]:
      if x in births:
        births[x] = time + 1
    used = [True] * op.num_carry + [x in self.live for x in op.outs[op.num_carry:]]
    inner = _Analysis(op.body, used, op.num_consts, op.num_carry)
    loops.append((time, inner.result()))

  def _overlap(self, roots, births, deaths):
    """Exchanges run beside products: what is gathered is there a product earlier, what is scattered
    a product longer, and so are the operands of products that only results of the program need,
    with which the compiler fills its waits."""
    products = [time for time, op in enumerate(self.ops) if op.name in _PRODUCTS]
    later = lambda time, count: max([at for at in products if at > time][:count], default=time)
    needed = self._needed_here()
    for time, op in enumerate(self.ops):
      kind = op.moved[0] if op.moved else None
      if kind == 'all-gather' and op.outs[0] in births:
        births[op.outs[0]] = max((at for at in products if at < time), default=time)
      is_last = op.name == 'dot_general' and op not in needed
      if kind == 'reduce-scatter' or is_last:
        until = later(time, DELAY if is_last else SCATTER)
        for root in set().union(*(roots.get(x, ()) for x in op.ins)):
          if root in births:
            deaths[root] = max(deaths.get(root, 0), until)
        if is_last and self._is_windowed(op):
          self.copies.append((op.ins[0], time, until))

  def _is_windowed(self, op) -> bool:
    """Whether a product is scattered over one mesh axis of many devices: the compiler does both in
    turns, and copies an operand to another layout for them."""
    x = op.outs[0]
    while len(self.users[x]) == 1:
      user = self.users[x][0]
      if user.moved:
        devices = math.prod(x.mesh[axis] for axis in user.moved[1])
        return user.moved[0] == 'reduce-scatter' and devices >= WINDOWED_FROM
      x = user.outs[0]
    return False

  def _needed_here(self) -> set[Op]:
    """Operations on which a kernel, or a product that is needed here itself, depends."""
    needed = set()
    for op in reversed(self.ops):
      if op.name in ('pallas_call', 'scan') or any(x in self.carried_out for x in op.outs):
        needed.add(op)
      if op in needed:
        needed.update(self.maker[x] for x in op.ins if x in self.maker)
    return needed

  def _end(self, roots, births, deaths):
    """Results are there at the end; rows of a stack are written where they belong."""
    end = len(self.ops)
    for x in self.outs:
      for root in roots.get(x, ()):
        if x not in self.rows:
          deaths[root] = end
        elif root in births and deaths.get(root, -1) <= births[root]:
          deaths[root] = births[root] - 1

  def _reuse(self, births, deaths):
    """An elementwise result takes the place of an operand that nothing reads again."""
    for x, birth in births.items():
      op = self.maker.get(x)
      if op is None or op.name == 'transpose' or not (_is_elementwise(op) or op.name == 'psum'):
        continue
      for y in self._operands(op):
        if y in births and deaths.get(y) == birth and y.bytes == x.bytes:
          deaths[y] = birth - 1
          break

  def _operands(self, op):
    """The arrays that an elementwise operation reads, through others that are none."""
    seen, waiting = [], list(op.ins)
    for x in waiting:
      source = self._source(x)
      if source in self.arrays or source not in self.maker:
        seen.append(source)
      elif len(waiting) < 100:
        waiting += self.maker[source].ins
    return seen


def _source(maker, x):
  while x in maker and (op := maker[x]) and _is_view(op):
    if op.name == 'scan':
      same = _copies(op).get(op.outs.index(x))
      if same is None:
        return x
      x = op.outs[same]
    else:
      x = op.ins[op.outs.index(x) if op.name == 'optimization_barrier' else 0]
  return x


def _copies(loop: Op) -> dict[int, int]:
  """Of what a loop stacks, the places that hold the same as one before."""
  maker, first, copies = {x: op for op in loop.body.ops for x in op.outs}, {}, {}
  for i, x in enumerate(loop.body.outs):
    if i >= loop.num_carry:
      source = _source(maker, x)
      if first.setdefault(source, i) != i:
        copies[i] = first[source]
  return copies


def _is_view(op: Op) -> bool:
  return op.name in _VIEWS or op.name == 'scan' or (
      op.name == 'sharding_constraint' and not op.moved and op.ins[0].bytes == op.outs[0].bytes)


def _late(ops: list[Op]) -> list[Op]:
  """The same operations, those that no loop needs behind it, as the compiler's scheduler has them:
  it starts at the end."""
  deadline, users = {}, collections.defaultdict(list)
  loops = [op for op in ops if op.name == 'scan']
  number = {op: i for i, op in enumerate(loops)}
  for op in reversed(ops):
    of_users = [deadline[user] for x in op.outs for user in users[x]]
    deadline[op] = number[op] if op in number else min(of_users, default=len(loops))
    for x in op.ins:
      users[x].append(op)
  return sorted(ops, key=lambda op: (deadline[op], op in number))


def _is_elementwise(op: Op) -> bool:
  return not (op.name in _VIEWS or op.name in _ARRAYS or op.moved or op.name.startswith('reduce_')
              or op.name in ('sharding_constraint',))


def _casts(loop: Op) -> list[tuple[Value, int]]:
  """Stacks whose rows a loop casts to a smaller dtype, and its size."""
  ops, _ = live_ops(loop.body, [True] * len(loop.body.outs))
  first = loop.num_consts + loop.num_carry
  stacks, found = dict(zip(loop.body.ins[first:], loop.ins[first:])), []
  for op in ops:
    if op.name in _VIEWS and op.ins and op.ins[0] in stacks and op.name != 'optimization_barrier':
      stacks[op.outs[0]] = stacks[op.ins[0]]
    if op.name == 'convert_element_type' and op.ins[0] in stacks:
      if op.outs[0].itemsize < op.ins[0].itemsize:
        found.append((stacks[op.ins[0]], op.outs[0].itemsize))
  return found


def live_ops(program: Program, used: Sequence[bool]) -> tuple[list[Op], set[Value]]:
  """The operations on which the used results depend, and their values."""
  live, kept = {x for x, is_used in zip(program.outs, used) if is_used}, []
  for op in reversed(program.ops):
    is_live = [x in live for x in op.outs]
    if not any(is_live):
      continue
    if op.name == 'optimization_barrier':
      op = Op(op.name, [x for x, keep in zip(op.ins, is_live) if keep],
              [x for x, keep in zip(op.outs, is_live) if keep])
      live.update(op.ins)
    elif op.name == 'scan':
      needed = [True] * op.num_carry + is_live[op.num_carry:]
      _, inner = live_ops(op.body, needed)
      first = op.num_consts
      live.update(x for i, (x, row) in enumerate(zip(op.ins, op.body.ins))
                  if row in inner or first <= i < first + op.num_carry)
    else:
      live.update(op.ins)
    kept.append(op)
  return kept[::-1], live
