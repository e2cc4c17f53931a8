"""Reads the text of an optimised HLO module: what runs how often, and what the devices exchange.

The TPU compiler states neither the trips of a loop nor a sum of anything: they are read from the
loop's condition, and multiplied through nested loops.
"""
from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

import numpy as np

BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 'f8e4m3fn': 8, 'f8e5m2': 8, 'bf16': 16,
        'f16': 16, 's16': 16, 'u16': 16, 'f32': 32, 's32': 32, 'u32': 32, 'f64': 64, 's64': 64,
        'u64': 64, 'c64': 64}
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
               'ragged-all-to-all')
_ARRAY = re.compile(r'\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]')
_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{')
_NAME = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
_OPCODE = re.compile(r'(?:^|[ )])([a-z][\w\-]*)\(')
_CALLED = re.compile(r'(?:calls|to_apply|async_execution_thread_calls)=%?([\w.\-]+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_MOVES_NOTHING = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'constant', 'call',
                  'conditional', 'after-all', 'partition-id', 'async-start', 'async-done',
                  'call-start', 'call-done')
_TAKES_A_PART = ('slice', 'dynamic-slice', 'gather')
_PALLAS = ('tpu_custom_call', '__gpu$xla.gpu.triton')
_LIMIT = 2**62  # the compiler's word for "unknown"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = shape opcode(rest`."""
  name: str
  shape: str
  opcode: str
  rest: str
  is_root: bool

  def match(self, pattern: str) -> str | None:
    """The first group of a pattern in what follows the opcode."""
    found = re.search(pattern, self.rest)
    return found and found[1]

  @property
  def cycles(self) -> int:
    """The compiler's estimate, without what it calls."""
    found = _CYCLES.search(self.rest)
    return int(found[1]) if found and int(found[1]) < _LIMIT else 0

  @property
  def op_name(self) -> str:
    """What the program called it."""
    return self.match(r'op_name="([^"]*)"') or ''


@dataclasses.dataclass(frozen=True)
class Call:
  """An instruction, how often it runs in one run of the module, and what surrounds it.

  loop: the body of the innermost loop, or the entry.  path: computations from there to it.
  """
  instruction: Instruction
  times: int
  loop: str
  path: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange of one step.

  bytes: of its result on one device, each time.  axes: of the mesh, `?` where they are unknown.
  overlapped: whether it runs beside computation.
  """
  op: str
  bytes: int
  times: int
  axes: tuple[str, ...]
  overlapped: bool
  op_name: str


def num_bytes(shape: str) -> int:
  """Bytes of an array, or of a tuple of them, without the padding of its layout."""
  return sum(BITS[dtype] * math.prod(int(n) for n in sizes.split(',') if n) // 8
             for dtype, sizes in _ARRAY.findall(shape) if dtype in BITS)


def hbm_bytes(shape: str) -> int:
  """`num_bytes` of those arrays whose layout names no other memory, as S(1), a TPU's VMEM."""
  return sum(num_bytes(array) for array in re.findall(r'\w+\[[0-9,]*\](?:\{[^}]*\})?', shape)
             if 'S(' not in array)


def num_elements(shape: str) -> int:
  """Elements of an array."""
  return math.prod(int(n) for n in _ARRAY.search(shape)[2].split(',') if n)


class Module:
  """An optimised HLO module.

  computations: instructions by the name of the computation; `entry` is the first to run.
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry, self._tables, self._scopes = '', _tables(text), {}
    self._apart = set(re.findall(r' call-start\(.*to_apply=%?([\w.\-]+)', text))
    current = None
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        current = self.computations[head[2]] = []
        self.entry = head[2] if head[1] else self.entry
      elif line == '}':
        current = None
      elif current is not None and (named := _NAME.match(line)):
        opcode = _OPCODE.search(named[3])
        if opcode:
          current.append(Instruction(named[2], named[3][:opcode.start()], opcode[1],
                                     named[3][opcode.end():], bool(named[1])))

  def calls(self) -> Iterator[Call]:
    """Every instruction that runs, in order, with those of loops and fusions."""
    yield from self._calls(self.entry, 1, self.entry, ())

  def _calls(self, name, times, loop, path):
    for instruction in self.computations.get(name, ()):
      yield Call(instruction, times, loop, path)
      if instruction.opcode == 'while':
        body, trips = self.loop(instruction)
        yield from self._calls(body, times * trips, body, ())
      elif instruction.opcode in ('fusion', 'call', 'async-start', 'call-start'):
        for called in _CALLED.findall(instruction.rest):
          yield from self._calls(called, times, loop, (*path, called))

  def loop(self, instruction: Instruction) -> tuple[str, int]:
    """The body of a `while`, and its turns: as the compiler states them, else the constant of its
    condition, by the step of the counter that is compared; 1 where neither is a constant."""
    body, condition = (instruction.match(rf'{word}=%?([\w.\-]+)')
                       for word in ('body', 'condition'))
    if stated := instruction.match(r'"known_trip_count":\{"n":"(\d+)"'):
      return body, int(stated)
    limit, index, waiting = 1, None, [condition]
    for name in waiting:
      for instruction in self.computations.get(name, ()):
        waiting += _CALLED.findall(instruction.rest)
        if instruction.opcode == 'constant' and (value := re.match(r'(\d+)\)', instruction.rest)):
          limit = max(limit, int(value[1]))
        if instruction.opcode == 'get-tuple-element' and name == condition and index is None:
          index = int(instruction.match(r'index=(\d+)'))
    return body, max(1, limit // self._step(body, index))

  def _step(self, body, index):
    found = {x.name: x for x in self.computations.get(body, ())}
    root = next((x for x in found.values() if x.is_root and x.opcode == 'tuple'), None)
    operands = re.findall(r'%([\w.\-]+)', root.rest) if root else []
    counter = found.get(operands[index]) if index is not None and index < len(operands) else None
    if counter is not None and counter.opcode == 'add':
      for name in re.findall(r'%([\w.\-]+)', counter.rest):
        if name in found and found[name].opcode == 'constant':
          return max(1, int(found[name].rest.split(')')[0]))
    return 1

  def estimated_cycles(self) -> dict[str, int]:
    """The compiler's estimates, summed over the turns of each loop."""
    cycles = {}
    for call in self.calls():
      if call.instruction.cycles:
        cycles[call.loop] = cycles.get(call.loop, 0) + call.times * call.instruction.cycles
    return cycles

  def kernels(self) -> list[tuple[str, str, int]]:
    """(name, shape of the result, times) of each call of a Pallas kernel."""
    return [(re.sub(r'(\.\d+|\.clone)+$', '', call.instruction.name), call.instruction.shape,
             call.times) for call in self.calls()
            if call.instruction.match(r'custom_call_target="([^"]*)"') in _PALLAS]

  def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
    """What the devices of a mesh, {axis: size}, exchange.

    One in several fusions, which compute beside it, is one: its pieces have the same channel and
    name (but all that `jax.shard_map` makes are of one channel). Between slices the hosts do it
    (`recv` of the Megascale runtime), along the axis `slice`.
    """
    found = {}
    for call in self.calls():
      if kind := call.instruction.match(r'_xla_megascale_transfer_type="(\w+)"'):
        if call.instruction.opcode == 'recv':
          array = _ARRAY.search(call.instruction.shape)[0]
          found[call.loop, call.instruction.name] = Collective(
              kind.lower().replace('_', '-'), num_bytes(array), call.times, ('slice',), True,
              call.instruction.match(r'_xla_host_transfer_rendezvous="([^"]*)"'))
        continue
      op = call.instruction.opcode.removesuffix('-start')
      if op not in COLLECTIVES:
        continue
      scattered = any('all-reduce-scatter' in name for name in call.path)
      shape = self._scattered_shape(call) if scattered else self._done(call).shape
      one = call.instruction.name
      if call.path and (channel := call.instruction.match(r'channel_id=(\d+)')):
        one = channel, call.instruction.op_name, _ARRAY.findall(shape)
      overlapped = call.instruction.opcode.endswith('-start') or any(
          self._runs_beside(name) for name in call.path)
      found.setdefault((call.loop, op, str(one)), Collective(
          'reduce-scatter' if scattered else op, num_bytes(shape), call.times,
          _axes(call.instruction, mesh), overlapped, call.instruction.op_name))
    return sorted(found.values(), key=lambda x: -x.bytes * x.times)

  def _done(self, call):
    """The end of what a -start begins, whose result is of what was exchanged alone."""
    scope = self._scope(call.path[-1] if call.path else call.loop).values()
    op = call.instruction.opcode.replace('-start', '-done')
    return next((x for x in scope if x.opcode == op and op != call.instruction.opcode
                 and call.instruction.name in _operands(x)), call.instruction)

  def _runs_beside(self, name):
    """Whether a computation starts a collective and goes on, or is another core's (tpu7x)."""
    return any(x.opcode == 'custom-call' and 'AsyncCollective' in x.rest
               for x in self.computations[name]) or name in self._apart

  def flops(self) -> int:
    """FLOPs of all products of two matrices, those of kernels aside."""
    return sum(call.times * self._flops(call) for call in self.calls()
               if call.instruction.opcode in ('convolution', 'dot'))

  def _flops(self, call):
    """2 B M N K, from the sizes B M K, B K N and B M N of operands and result."""
    scope = self._scope(call.path[-1] if call.path else call.loop)
    operands = [scope[name] for name in _operands(call.instruction)[:2]]
    sizes = [num_elements(x.shape) for x in (*operands, call.instruction)]
    batched = call.instruction.match(r'lhs_batch_dims=\{([\d,]*)\}')
    lengths = _ARRAY.search(operands[0].shape)[2].split(',')
    batch = math.prod(int(lengths[int(i)]) for i in (batched or '').split(',') if i)
    return 2 * math.isqrt(math.prod(sizes) // batch)

  def stacked_bytes(self) -> int:
    """Bytes that loops of the forward pass keep for the backward pass, a row for each turn."""
    total = 0
    for call in self.calls():
      loop = call.instruction
      if loop.opcode != 'while' or call.loop != self.entry or 'transpose(' in loop.op_name:
        continue
      body, trips = self.loop(loop)
      written = {x.name: x for x in self.computations[body]
                 if re.search('dynamic.update.slice', x.name)}
      root = next(x for x in self.computations[body] if x.is_root)
      total += sum(num_bytes(written[name].shape)
                   for name in re.findall(r'%([\w.\-]+)', root.rest)
                   if name in written and re.match(rf'\w+\[{trips},', written[name].shape))
    return total

  def traffic(self) -> int:
    """Bytes that all instructions read from HBM and write to it: whole operands and results, but of
    a slice only what is taken, and of an update in place only what is written."""
    fused = {name for body in self.computations.values() for x in body if x.opcode == 'fusion'
             for name in _CALLED.findall(x.rest)}
    return sum(call.times * self._moved(call) for call in self.calls()
               if call.instruction.opcode not in _MOVES_NOTHING and fused.isdisjoint(call.path))

  def _moved(self, call):
    instruction, scope = call.instruction, self._scope(call.path[-1] if call.path else call.loop)
    operands = [scope[name].shape for name in _operands(instruction) if name in scope]
    read, written = [hbm_bytes(shape) for shape in operands], hbm_bytes(instruction.shape)
    if instruction.opcode.endswith('-start'):  # its result is that of the -done, and its operands
      written = 0
    elif instruction.opcode.endswith('-done'):
      read = []
    elif instruction.opcode in _TAKES_A_PART:
      read = [written]
    elif instruction.opcode == 'dynamic-update-slice':
      read, written = [0, read[1]], read[1]
    elif instruction.opcode == 'fusion':
      body = self.computations[_CALLED.findall(instruction.rest)[0]]
      read = [min(size, self._read(body, i)) for i, size in enumerate(read)]
      written = min(written, self._written(body))
    return sum(read) + written

  def _scope(self, name):
    if name not in self._scopes:
      self._scopes[name] = {x.name: x for x in self.computations[name]}
    return self._scopes[name]

  def _read(self, body, index):
    """Bytes that a fused computation needs of an operand, if all its uses take parts of it."""
    name = next((x.name for x in body if x.opcode == 'parameter' and
                 x.rest.startswith(f'{index})')), None)
    total = 0
    for user in (x for x in body if name in _operands(x)):
      if user.opcode in _TAKES_A_PART:
        total += num_bytes(user.shape)
      elif user.opcode != 'dynamic-update-slice' or _operands(user)[0] != name:
        return math.inf
    return total

  def _written(self, body):
    """Bytes that a fused computation writes, if it updates its result in place."""
    scope = {x.name: x for x in body}
    root = next(x for x in body if x.is_root)
    while root.opcode in ('bitcast', 'convert', 'copy') and _operands(root)[0] in scope:
      root = scope[_operands(root)[0]]
    if root.opcode != 'dynamic-update-slice' or _operands(root)[1] not in scope:
      return math.inf
    return num_bytes(scope[_operands(root)[1]].shape)

  def _scattered_shape(self, call):
    """Of the part that each device keeps of a sum over all."""
    name = next(name for name in call.path if 'all-reduce-scatter' in name)
    return next(x.shape for x in self.computations[name] if x.is_root)

  def source(self, instruction: Instruction) -> str:
    """file:line that made an instruction, of the innermost frame; '' where it is unknown."""
    names, locations, frames = self._tables
    frame = frames.get(instruction.match(r'stack_frame_id=(\d+)'))
    if frame is None or frame not in locations:
      return ''
    name, line = locations[frame]
    return f'{names[name]}:{line}'

  def buffers(self) -> list[tuple[int, Instruction, str]]:
    """(bytes, instruction, loop) of each array in HBM that something computes, largest first."""
    skipped = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'constant', 'call',
               'copy-start', 'copy-done')
    found = {}
    for call in self.calls():
      if call.path or call.instruction.opcode in skipped:
        continue
      for shape in re.findall(r'\w+\[[0-9,]*\]\{[^}]*\}', call.instruction.shape):
        if 'S(' not in shape:  # another memory than HBM
          found[call.instruction.name, shape] = (num_bytes(shape), call.instruction, call.loop)
    return sorted(found.values(), key=lambda x: -x[0])


def _operands(instruction):
  return re.findall(r'%([\w.\-]+)', instruction.rest.split(')')[0])


def _tables(text):
  """The module's tables of file names, {id: (file, line)} and {frame: location}."""
  names = dict(re.findall(r'^(\d+) "([^"]*)"$', text.partition('FunctionNames')[0], re.M))
  locations = {key: (name, line) for key, name, line in re.findall(
      r'^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)', text, re.M)}
  frames = dict(re.findall(r'^(\d+) \{file_location_id=(\d+)', text, re.M))
  return names, locations, frames


def _axes(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a collective's first group differ."""
  group = _first_group(instruction.rest, math.prod(mesh.values()))
  if not group or max(group) >= math.prod(mesh.values()):
    return ('?',)
  places = np.array(np.unravel_index(group, tuple(mesh.values())))
  return tuple(axis for axis, row in zip(mesh, places) if len(set(row.tolist())) > 1)


def _first_group(text: str, num_devices: int) -> list[int]:
  if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', text):
    return [int(pairs[1]), int(pairs[2])]
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
    sizes = {key: int(size) for key, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    if math.prod(sizes.values()) != num_devices:
      return []
    used = re.findall(r"'(\w+)'", named[2])
    index = tuple(slice(None) if key in used else 0 for key in sizes)
    return np.arange(num_devices).reshape(tuple(sizes.values()))[index].ravel().tolist()
  if tiled := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    ids = np.arange(num_devices).reshape([int(n) for n in tiled[3].split(',')])
    ids = ids.transpose([int(n) for n in tiled[4].split(',')]) if tiled[4] else ids
    return ids.reshape(int(tiled[1]), int(tiled[2]))[0].tolist()
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', text)
  return [int(n) for n in listed[1].split(',')] if listed else list(range(num_devices))
