"""Prompts and targets: how an example is put to a model that reads and writes text."""

from __future__ import annotations

import dataclasses
import string
from typing import Any, Mapping, Optional, Sequence, Tuple

from lm.data.examples.kinds import Example
from lm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Template:
  """Two lines of text with the example's fields in braces: 'mnli premise: {a} hypothesis: {b}'.

  Lists are joined by blanks. Beside the fields of the kind there are {label}, the word of a class;
  {target}, {answer} and {document}, the first of several; and {context} and {continuation} of a
  choice, of which there is a prompt and a target each: those of the right one are what a model
  learns, those of all what it is scored on, as are the targets of all classes.

  Attributes:
    inputs: the prompt.
    targets: what shall follow it; a decoder's begins with the blank that parts it from the prompt.
    words: (label, word) pairs, where a label's name is no good word for it.
    no_answer: the {answer} of a question without one.
  """

  inputs: str = '{a}'
  targets: str = '{label}'
  words: Tuple[Tuple[str, str], ...] = ()
  no_answer: str = 'unanswerable'

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
    return self._filled(self.targets, example if label is None else {**example, 'label': label})

  def choices(self, example: Example, labels: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Returns prompt and target of each choice of an example, or of each of the labels."""
    if 'continuations' not in example:
      return [(self.prompt(example), self.target(example, label)) for label in labels]
    each = [{**example, 'label': i} for i in range(len(example['continuations']))]
    return [(self.prompt(choice), self.target(choice)) for choice in each]

  def word(self, label: str) -> str:
    """Returns what stands for a label."""
    return dict(self.words).get(label, label)

  def _filled(self, text: str, example: Mapping[str, Any]) -> str:
    fields = {name: _written(value) for name, value in example.items()}
    if 'continuations' in example:
      fields['context'] = example['contexts'][example['label']]
      fields['continuation'] = example['continuations'][example['label']]
    elif 'label' in example:
      fields['label'] = self.word(str(example['label']))
    if 'answers' in example:
      fields['answer'] = example['answers'][0] if example['answers'] else self.no_answer
    for name in ('targets', 'documents'):
      if example.get(name):
        fields[name[:-1]] = example[name][0]
    try:
      return text.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
      raise UserError(f'The template {text!r} cannot be filled ({error}); examples have the fields'
                      f' {sorted(fields)}.') from error


def _written(value: Any) -> Any:
  return ' '.join(map(str, value)) if isinstance(value, list) else value
