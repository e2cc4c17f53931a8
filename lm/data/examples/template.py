"""Prompts and targets: how an example is put to a model that reads and writes text."""

from __future__ import annotations

import dataclasses
import string
from typing import Any, Mapping, Optional, Sequence, Tuple

from lm.data.examples.kinds import Example
from lm.errors import UserError

# A field that only one kind has, and its bare prompt and target.
_BARE = (
    ('continuations', '{context}', '{continuation}'), ('query', '{query}', '{document}'),
    ('question', '{question} {context}', '{answer}'), ('words', '{words}', '{tags}'),
    ('source', '{source}', '{target}'), ('text', '', '{text}'), ('score', '{a} {b}', '{score}'),
    ('b', '{a} {b}', '{label}'), ('a', '{a}', '{label}'))


@dataclasses.dataclass(frozen=True)
class Template:
  """Two lines of text with the example's fields in braces: 'mnli premise: {a} hypothesis: {b}'.

  Lists are joined by blanks. Beside the fields of the kind there are {label}, the word of a class;
  {target}, {answer} and {document}, the first of several; and {context} and {continuation} of a
  choice, of which there is a prompt and a target each: those of the right one are what a model
  learns, those of all what it is scored on, as are the targets of all classes.

  Attributes:
    inputs: the prompt; None for the bare text of the kind.
    targets: what shall follow it; a decoder's begins with the blank that parts it from the prompt;
      None for the bare target of the kind.
    words: (label, word) pairs, where a label's name is no good word for it.
    no_answer: the {answer} of a question without one.
    shots: training examples that stand before the prompt, with their targets: the same before all
      prompts, chosen by `shots_seed`; before one of themselves, the next of the choice is put in.
    between: stands behind each of them.
    shown: the choice, one more than `shots`, which a task that is prepared fills in.
  """

  inputs: Optional[str] = None
  targets: Optional[str] = None
  words: Tuple[Tuple[str, str], ...] = ()
  no_answer: str = 'unanswerable'
  shots: int = 0
  shots_seed: int = 0
  between: str = '\n\n'
  shown: Tuple[Any, ...] = ()

  def __post_init__(self) -> None:
    if self.shots < 0:
      raise UserError(f'shots={self.shots} must not be negative.')
    for text in filter(None, (self.inputs, self.targets)):
      try:
        list(string.Formatter().parse(text))
      except ValueError as error:
        raise UserError(f'The template {text!r} is damaged ({error}); write {{{{ for a brace that'
                        ' names no field.') from error

  def prompt(self, example: Example) -> str:
    """Returns the input text, behind the examples that are shown."""
    shown = [shot for shot in self.shown if not _same(shot, example)]
    before = [self._filled(0, shot) + self._behind_prompt(shot) + self.between
              for shot in shown[:self.shots]]
    return ''.join(before) + self._filled(0, example)

  def _behind_prompt(self, example: Example) -> str:
    target = self.target(example)
    is_apart = self.inputs == '' or target[:1].isspace()
    return target if is_apart else f' {target}'

  def target(self, example: Example, label: Optional[str] = None) -> str:
    """Returns the target text, of another label if one is given."""
    return self._filled(1, example if label is None else {**example, 'label': label})

  def choices(self, example: Example, labels: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Returns prompt and target of each choice of an example, or of each of the labels."""
    if 'continuations' not in example:
      return [(self.prompt(example), self.target(example, label)) for label in labels]
    each = [{**example, 'label': i} for i in range(len(example['continuations']))]
    return [(self.prompt(choice), self.target(choice)) for choice in each]

  def word(self, label: str) -> str:
    """Returns what stands for a label."""
    return dict(self.words).get(label, label)

  def _filled(self, which: int, example: Mapping[str, Any]) -> str:
    text = (self.inputs, self.targets)[which]
    if text is None:
      text = next(texts for field, *texts in _BARE if field in example)[which]
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


def _same(shot: Example, example: Example) -> bool:
  """Whether they are one example, but for its id and for the choice that is asked about."""
  hidden = ('id', 'label') if 'continuations' in example else ('id',)
  return shot['id'] == example.get('id') or all(
      shot.get(name) == value for name, value in example.items() if name not in hidden)
