"""Prompts and targets: how an example is put to a model that reads and writes text."""

from __future__ import annotations

import dataclasses
import json
import string
from typing import Any, Mapping, Optional, Tuple

from lm.data.examples.kinds import Example
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Template:
  """Two lines of text with the example's fields in braces: 'mnli premise: {a} hypothesis: {b}'.

  Lists are joined by blanks. Of a classification {label} is its word, and the targets of all labels
  are the continuations that a decoder is scored on.

  Attributes:
    inputs: the prompt.
    targets: what shall follow it; a decoder's begins with the blank that parts it from the prompt.
    words: (label, word) pairs, where a label's name is no good word for it.
  """

  inputs: str = '{a}'
  targets: str = '{label}'
  words: Tuple[Tuple[str, str], ...] = ()

  def __post_init__(self) -> None:
    for text in (self.inputs, self.targets):
      try:
        list(string.Formatter().parse(text))
      except ValueError as error:
        raise UserError(f'The template {text!r} is damaged ({error}); write {{{{ for a brace that'
                        ' names no field.') from error

  def prompt(self, example: Example) -> str:
    """Returns the input text."""
    return self._filled(self.inputs, example)

  def target(self, example: Example, label: Optional[str] = None) -> str:
    """Returns the target text, of another label if one is given."""
    fields: Mapping[str, Any] = example if label is None else {**example, 'label': label}
    return self._filled(self.targets, fields)

  def word(self, label: str) -> str:
    """Returns what stands for a label."""
    return dict(self.words).get(label, label)

  def _filled(self, text: str, example: Mapping[str, Any]) -> str:
    fields = {name: _written(value) for name, value in example.items()}
    if 'label' in example:
      fields['label'] = self.word(str(example['label']))
    if example.get('targets'):
      fields['target'] = str(example['targets'][0])
    try:
      return text.format(**fields)
    except (KeyError, IndexError) as error:
      raise UserError(f'The template {text!r} asks for {error}, which examples do not have; they'
                      f' have {sorted(fields)}.') from error


def _written(value: Any) -> str:
  if isinstance(value, list):
    return ' '.join(map(str, value))
  return value if isinstance(value, str) else json.dumps(value)
