"""Which values of a traced program are arrays in memory, and what makes each of them at once.

What the compiler does is imitated: a result of a product, a kernel, a loop, an exchange or a sum is
an array; elementwise operations and casts belong to what reads them, or where that is much later to
what made their operands; casts of parameters to the dtype of products are made for all layers at
once, before the loops.
"""
from collections.abc import Iterator, Sequence
import collections
import dataclasses

from lm.parallel.plan_program import Op, Program, Value

_VIEWS = {'reshape', 'squeeze', 'expand_dims', 'name', 'stop_gradient', 'copy', 'copy_p', 'split',
          'optimization_barrier', 'reduce_precision', 'pvary', 'mesh_cast', 'reshard'}
_ARRAYS = {'dot_general', 'pallas_call', 'gather', 'scatter-add', 'scatter_add', 'scatter', 'sort',
           'top_k', 'cumsum', 'argmax', 'concatenate', 'ragged_dot_general', 'ragged_dot', 'scan',
           'while', 'dynamic_update_slice'}
PRODUCTS = {'dot_general', 'pallas_call', 'ragged_dot_general', 'ragged_dot'}


@dataclasses.dataclass(frozen=True)
class Fusion:
  """What the compiler makes at once: the products in it, what it reads and what it writes."""
  name: str
  products: tuple[Op, ...]
  reads: frozenset[Value]
  writes: list[Value]


class Arrays:
  """Of one program: the main one, or the body of a loop. Behind `num_consts` inputs it has
  `num_carry` whose buffers are its own, and as many results; other results are written in place.

  ops: those that are needed, in order.  arrays: the values that are arrays.
  hoisted: casts of stacked parameters, made once before the loops: (array, first, last loop).
  """

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
    self.hoisted = self._hoisted()
    self._products()
    self._needed_whole()
    self._kept()

  def body(self, loop: Op) -> 'Arrays':
    """Of one turn of a loop."""
    used = [True] * loop.num_carry + [x in self.live for x in loop.outs[loop.num_carry:]]
    return type(self)(loop.body, used, loop.num_consts, loop.num_carry)

  def fusions(self) -> Iterator[Fusion]:
    """What is made at once, loops aside: an array and all that is computed only for it; sums of the
    same arrays are made together."""
    seen, sums = set(), {}
    for op in self.ops:
      for x in op.outs if op.name == 'pallas_call' else [x for x in op.outs if x in self.arrays]:
        if op.name == 'scan' or op.moved or op in seen:
          continue
        fusion = self._fusion(x, op)
        if op.name == 'pallas_call':
          seen.add(op)
        if fusion.products or not op.name.startswith('reduce_'):
          yield fusion
        elif fusion.reads in sums:
          sums[fusion.reads].writes.append(x)
        else:
          sums[fusion.reads] = fusion
    yield from sums.values()

  def _fusion(self, x, op):
    if op.name in ('gather', 'dynamic_update_slice', 'scatter', 'scatter-add', 'scatter_add'):
      rows = x if op.name == 'gather' else op.ins[1 if op.name[0] == 'd' else 2]
      return Fusion(op.name, (), frozenset([rows]), [rows])
    ops, reads = [op], set()
    for inner in ops:
      for y in map(self.source, inner.ins):
        if y in self.arrays or y not in self.maker:
          reads.add(y)
        elif self.maker[y] not in ops:
          ops.append(self.maker[y])
    products = tuple(inner for inner in ops if inner.name in PRODUCTS)
    large = max([y.bytes for y in (*reads, x)], default=0) / 64
    return Fusion(op.name, products, frozenset(y for y in reads if y.bytes > large),
                  list(op.outs) if op.name == 'pallas_call' else [x])

  # What is an array.

  def _hoisted(self) -> list[tuple[Value, int, int]]:
    """Casts of stacked parameters in loops, made once before them: (array, first, last loop)."""
    found = {}
    for time, op in enumerate(self.ops):
      if op.name != 'scan':
        continue
      for stack, itemsize in _casts(op):
        source = self.source(stack)
        if source in self.program.ins:
          first = found.get((source, itemsize), (None, time, time))[1]
          value = dataclasses.replace(source, itemsize=itemsize)
          found[source, itemsize] = (value, first, time)
    return list(found.values())

  def source(self, x: Value) -> Value:
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
      if not casts and (op.name != 'dot_general' or not is_elementwise(user)):
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
      if op.name == 'transpose' and self.source(op.ins[0]) in self.maker:
        if self.maker[self.source(op.ins[0])].name == 'scan':
          self.arrays.add(op.outs[0])
    readers = collections.Counter()
    for op in self.ops:
      if op.name in PRODUCTS:
        readers.update({self.source(x) for x in op.ins})
    for x, count in readers.items():
      if count > 1 and x in self.maker and is_elementwise(self.maker[x]):
        self.arrays.add(x)

  def _mark(self, x):
    x = self.source(x)
    if x in self.maker:
      self.arrays.add(x)

  def _kept(self):
    """Marks what is read on both sides of a loop: it is not computed again behind it."""
    loops = [time for time, op in enumerate(self.ops) if op.name == 'scan']
    for op in self.ops:
      if op.name in ('iota', 'broadcast_in_dim') or not is_elementwise(op):
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
    while x in self.maker and is_elementwise(self.maker[x]):
      large = {self.source(y) for y in self.maker[x].ins if y.num_elements == size}
      large = {y for y in large if not self._is_of_smaller(y)}
      if len(large) != 1:
        break
      x = large.pop()
      best = x if x.bytes < best.bytes else best
    return best

  def _is_of_smaller(self, x: Value) -> bool:
    op = self.maker.get(x)
    return op is not None and is_elementwise(op) and all(
        y.num_elements < x.num_elements for y in op.ins)

  def operands(self, op):
    """The arrays that an elementwise operation reads, through others that are none."""
    seen, waiting = [], list(op.ins)
    for x in waiting:
      source = self.source(x)
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


def is_elementwise(op: Op) -> bool:
  """Whether it makes each element of a result of few others, so that it needs no array."""
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
