"""When each array of a traced program is in a device's memory, and the most that is there at once.

What the compiler does is imitated: loops carry in place and write rows of stacks in place, and
elementwise results take the place of an operand that nothing reads again.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np

from lm.parallel.plan_arrays import Arrays, is_elementwise, PRODUCTS
from lm.parallel.plan_program import Op, Program, Value

SCATTER, DELAY = 1, 2  # products later, of what is scattered, and of what results alone need
WINDOWED_FROM = 8  # devices


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


class _Analysis(Arrays):
  """Of one program: from when to when its arrays are in memory."""

  def result(self) -> Lifetimes:
    """Their first and last times."""
    births, deaths, loops = {x: 0 for x in self.carried}, {}, []
    self.copies = []
    roots = {x: {x} for x in self.program.ins}
    for time, op in enumerate(self.ops):
      read = set().union(*(roots.get(x, ()) for x in op.ins))
      for i, x in enumerate(op.outs):
        source = self.source(x)
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
    loops.append((time, self.body(op).result()))

  def _overlap(self, roots, births, deaths):
    """Exchanges run beside products: what is gathered is there a product earlier, what is scattered
    a product longer, and so are the operands of products that only results of the program need,
    where they are scattered over many devices: with those the compiler fills its waits."""
    products = [time for time, op in enumerate(self.ops) if op.name in PRODUCTS]
    later = lambda time, count: max([at for at in products if at > time][:count], default=time)
    needed = self._needed_here()
    for time, op in enumerate(self.ops):
      kind = op.moved[0] if op.moved else None
      if kind == 'all-gather' and op.outs[0] in births:
        births[op.outs[0]] = max((at for at in products if at < time), default=time)
      is_last = op.name == 'dot_general' and op not in needed and self._is_windowed(op)
      if kind == 'reduce-scatter' or is_last:
        until = later(time, DELAY if is_last else SCATTER)
        for root in set().union(*(roots.get(x, ()) for x in op.ins)):
          if root in births:
            deaths[root] = max(deaths.get(root, 0), until)
        if is_last:
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
      if op is None or op.name == 'transpose' or not (is_elementwise(op) or op.name == 'psum'):
        continue
      for y in self.operands(op):
        if y in births and deaths.get(y) == birth and y.bytes == x.bytes:
          deaths[y] = birth - 1
          break
