"""Texts to be scored, packed into rows of a few static shapes; what texts share is there once.

Texts of one beginning make a tree: a token that begins several of them is one token of the row, so
that all of the model but attention is computed for it once. The choices of a question share the
question, minimal pairs all words before the first that differs. (Shared prefixes of decoding:
Hydragen, arXiv:2402.05099; here they are shared in one pass.)
"""
from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

SHORTEST = 128    # tokens of a row at least: a block of attention
LONG = 1024       # rows in which attention is no small part of the time
MOST_PATHS = 2    # a row's trees, written out path by path, are at most so often its length
SHARED = 1 / 3    # of a text's tokens are another's too: then the two make a tree
SLACK = 1.1       # of what a row has room for beside its tokens, over what texts need on average
OPEN_ROWS = 64    # that a text may still be put into


class Text(NamedTuple):
  """What one request asks of a model.

  inputs: int32 [T], at least one, of the decoder.
  targets: int32 [n], what follows the last n inputs, at least one.
  encoder: int32 [S], of an encoder-decoder; else None.
  """
  inputs: np.ndarray
  targets: np.ndarray
  encoder: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
  """Rows that one program scores.

  batch: SeqIO's features [rows, T], `decoder_path_*` where texts share tokens, and `scored_places`
    and `scored_targets` [rows, M]: which tokens' successors are asked for. Rows are as many as
    batches have, the last of them empty.
  batch_size: rows of a batch.
  answers: of each text that stands here its number, its row, and where in the row's M its targets
    are, int [n].
  """
  batch: dict[str, np.ndarray]
  batch_size: int
  answers: list[tuple[int, int, np.ndarray]]


class _Tree:
  """Texts whose beginnings are those of others, in the order of their ids."""

  def __init__(self):
    self.tokens: list[int] = []   # in the order of a depth-first walk
    self.depths: list[int] = []
    self.paths: list[np.ndarray] = []  # to the leaves, as places among `tokens`
    self.slots: dict[tuple[int, int], int] = {}  # (token, target): its place among those asked for
    self.answers: list[tuple[int, np.ndarray]] = []
    self.encoder: np.ndarray | None = None

  def add(self, number: int, text: Text, common: int):
    """Adds a text of which `common` inputs are those of the text before."""
    size, new = len(self.tokens), len(text.inputs) - common
    path = np.concatenate([self.paths[-1][:common] if common else np.zeros(0, int),
                           np.arange(size, size + new)])
    self.tokens += text.inputs[common:].tolist()
    self.depths += range(common, len(text.inputs))
    if self.paths and common == len(self.paths[-1]):  # goes on where that ended
      self.paths.pop()
    self.paths.append(path)
    asked = zip(path[-len(text.targets):].tolist(), text.targets.tolist())
    slots = [self.slots.setdefault(pair, len(self.slots)) for pair in asked]
    self.answers.append((number, np.array(slots)))
    self.encoder = text.encoder

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    """Tokens, tokens of all paths, tokens asked for, tokens of the encoder."""
    return (len(self.tokens), sum(map(len, self.paths)), len(self.slots),
            0 if self.encoder is None else len(self.encoder))


def _common(one: np.ndarray, other: np.ndarray) -> int:
  """Tokens with which both begin."""
  length = min(len(one), len(other))
  different = np.flatnonzero(one[:length] != other[:length])
  return int(different[0]) if len(different) else length


def _row_length(length: int) -> int:
  """Of a row for such a text: of short ones two at least, so that little of it is empty."""
  return max(SHORTEST, 1 << (min(2 * length, max(length, LONG)) - 1).bit_length())


def _trees(texts: Sequence[Text], shares: bool, longest: int) -> Iterator[_Tree]:
  """Trees of all texts; where the model does not share, only texts that go on with another do."""
  tree, last, room = None, None, 0
  for i in sorted(range(len(texts)), key=lambda i: texts[i].inputs.tolist()):
    text = texts[i]
    common = _common(last, text.inputs) if tree and text.encoder is None else 0
    joins = tree and common and common == len(last) and (
        len(tree.tokens) + len(text.inputs) - common <= longest)
    if shares and tree and not joins and common >= SHARED * len(text.inputs):
      tokens, paths, *_ = tree.sizes
      joins = (tokens + len(text.inputs) - common <= room
               and paths + len(text.inputs) <= MOST_PATHS * room)
    if not joins:
      if tree:
        yield tree
      tree, common = _Tree(), 0
    tree.add(i, text, common)
    last, room = text.inputs, min(_row_length(len(text.inputs)), longest)
  if tree:
    yield tree


def _fill(trees: Sequence[_Tree], longest: int) -> dict[int, tuple[list[list[_Tree]], np.ndarray]]:
  """Puts trees into rows, the longest first: {length: (the trees of each row, what it has room
  for)}.

  A row has room for its length of tokens and for as many of the rest as such texts have to such a
  number of tokens. (First-fit decreasing, with several sizes.)
  """
  sizes = np.array([tree.sizes for tree in trees])
  key = 3 if sizes[:, 3].any() else 0  # an encoder's tokens are the most
  lengths = [min(_row_length(size), max(longest, size)) for size in sizes[:, key].tolist()]
  filled = {}
  for length in sorted(set(lengths)):
    largest = sizes[np.equal(lengths, length)].max(0)
    usual = SLACK * length * sizes.sum(0) / sizes[:, key].sum()
    room = np.maximum(largest, -(-usual // 8) * 8).astype(int)
    room[key] = length
    filled[length] = [], room
  rows: list[tuple[list[_Tree], np.ndarray]] = []
  for i in np.argsort(-sizes[:, key], kind='stable').tolist():
    for members, room in rows:
      if (sizes[i] <= room).all():
        break
    else:
      members, room = [], filled[lengths[i]][1].copy()
      filled[lengths[i]][0].append(members)
      rows.append((members, room))
    members.append(trees[i])
    room -= sizes[i]
    if len(rows) > OPEN_ROWS:
      rows.remove(min(rows, key=lambda row: row[1][key]))
  return filled


def pack(texts: Sequence[Text], shares: bool, longest: int, batch_size: int) -> list[Shape]:
  """Rows of all texts, the longest first.

  Args:
    shares: whether the model takes `decoder_path_*`.
    longest: row of the model, in tokens.
    batch_size: rows of SHORTEST tokens at a time, or fewer longer ones.
  """
  trees = list(_trees(texts, shares, longest))
  shapes = []
  for length, (rows, room) in sorted(_fill(trees, longest).items(), reverse=True):
    most = max(1, batch_size * SHORTEST // length)
    number = -(-len(rows) // most)
    size = -(-len(rows) // max(number, 1))
    if rows:
      shapes.append(_shape(rows, room, size, number * size))
  return shapes


def _shape(rows: Sequence[Sequence[_Tree]], room: np.ndarray, size: int, total: int) -> Shape:
  """Writes the rows."""
  T, S, M, E = room.tolist()
  of = lambda length: np.zeros((total, length), np.int32)
  batch = {'decoder_input_tokens': of(T), 'decoder_segment_ids': of(T), 'decoder_positions': of(T),
           'scored_places': of(M), 'scored_targets': of(M)}
  if E:
    batch |= {'encoder_input_tokens': of(E), 'encoder_segment_ids': of(E)}
  if any(len(tree.paths) > 1 for trees in rows for tree in trees):
    batch |= {'decoder_path_tokens': of(S), 'decoder_path_segment_ids': of(S),
              'decoder_path_places': of(T)}
  answers = []
  for row, trees in enumerate(rows):
    values = {name: array[row] for name, array in batch.items()}
    start = np.zeros(4, int)  # of each size
    paths = 0
    for segment, tree in enumerate(trees, 1):
      first, place, slot, memory = start.tolist()
      end = first + len(tree.tokens)
      values['decoder_input_tokens'][first:end] = tree.tokens
      values['decoder_segment_ids'][first:end] = segment
      values['decoder_positions'][first:end] = tree.depths
      for (token, target), index in tree.slots.items():
        values['scored_places'][slot + index] = first + token
        values['scored_targets'][slot + index] = target
      if E:
        values['encoder_input_tokens'][memory:memory + len(tree.encoder)] = tree.encoder
        values['encoder_segment_ids'][memory:memory + len(tree.encoder)] = segment
      for path in tree.paths if 'decoder_path_tokens' in batch else ():
        paths += 1
        values['decoder_path_tokens'][place:place + len(path)] = first + path
        values['decoder_path_segment_ids'][place:place + len(path)] = paths
        values['decoder_path_places'][first + path] = place + np.arange(len(path))
        place += len(path)
      answers += [(number, row, slot + slots) for number, slots in tree.answers]
      start += tree.sizes
  return Shape(batch, size, answers)
