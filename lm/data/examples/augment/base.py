"""What augmentations share: which texts of which kinds they change, and how often."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Iterable, Sequence, Tuple

import numpy as np

from lm.data.examples.kinds import Example
from lm.errors import UserError

# Of each kind, the texts that may change without their label. An answer's place, the choices of a
# question and the text whose probability is asked may not.
TEXTS = {'classification': ('a', 'b'), 'similarity': ('a', 'b'), 'tagging': ('words',),
         'generation': ('source',), 'retrieval': ('query',)}
_ENTITY = ('B-', 'I-', 'E-', 'S-', 'L-', 'U-')  # How tags of entities begin: BIO, BIOES, BILOU.


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """A random change of training examples.

  A subclass has `text` and `tagged`, or `tokens`.

  Attributes:
    rate: share of the examples on which it is tried, in each epoch others; 0 changes nothing.
    growth: rows keep so many times an example's tokens free for it; of several augmentations, the
      largest counts. An example that becomes longer than that stays as it was. The defaults leave
      out at most one of 20, of sentences of 10 to 25 tokens.
    fields: names of the texts to be changed, of a pair ('a',) or ('b',); () takes all of them.
  """

  rate: float = 0.5
  growth: float = 1.0
  fields: Tuple[str, ...] = ()

  kinds: ClassVar[Tuple[str, ...]] = tuple(TEXTS)
  forms: ClassVar[Tuple[str, ...]] = ('encoder', 'text_to_text', 'decoder', 'embedder')

  def __post_init__(self) -> None:
    object.__setattr__(self, 'fields', tuple(self.fields))
    if not 0 <= self.rate <= 1:
      raise UserError(f'rate={self.rate} must be a share of the examples, between 0 and 1.')
    if not self.growth >= 1:
      raise UserError(f'growth={self.growth} must be at least 1, the length of an example.')

  def check(self, kind: str, form: str) -> None:
    """Looks whether a task's examples can be changed.

    Raises:
      UserError: they cannot, or `fields` names none of their texts.
    """
    name = type(self).__name__
    if kind not in self.kinds:
      raise UserError(f'{name} changes examples of {", ".join(self.kinds)}, and none of'
                      f' {kind}, whose answer it would lose; leave it out of augmentations.')
    if form not in self.forms:
      raise UserError(f'{name} goes with form={" or ".join(map(repr, self.forms))} and not with'
                      f' {form!r}; leave it out of augmentations.')
    strange = sorted(set(self.fields) - set(TEXTS[kind]))
    if strange:
      raise UserError(f'fields={self.fields} of {name}: a task of {kind} has no text'
                      f' {strange[0]!r} to change; name some of {TEXTS[kind]}, or () for all.')

  def open(self, texts: Iterable[str]) -> None:
    """Reads the files that it needs, before training begins.

    Args:
      texts: some of the training examples', where a file must fit them.
    """

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the example, changed or itself; its label is the same."""
    if rng.random() >= self.rate:
      return example
    if 'words' in example:
      words, tags = self.tagged(example['words'], example['tags'], rng)
      return {**example, 'words': words, 'tags': tags}
    return {**example, **{name: self.text(example[name], rng) for name in self.names(example)}}

  def names(self, example: Example) -> list[str]:
    """Returns which texts of an example are changed."""
    names = self.fields or [name for texts in TEXTS.values() for name in texts]
    return [name for name in dict.fromkeys(names) if name in example]

  def text(self, text: str, rng: np.random.Generator) -> str:
    """Returns the text, changed."""
    return text

  def tagged(self, words: list[str], tags: list[str], rng: np.random.Generator
             ) -> tuple[list[str], list[str]]:
    """Returns words and their tags, changed together."""
    return words, tags

  def tokens(self, encoded: Any, rng: np.random.Generator) -> Any:
    """Returns the tokens (`forms.Encoded`) of an example that has been through all `__call__`s."""
    return encoded


def free_places(tags: Sequence[str]) -> list[int]:
  """Returns the words that are no part of an entity: those that may go, move or be replaced."""
  return [i for i, tag in enumerate(tags) if not tag.startswith(_ENTITY)]
