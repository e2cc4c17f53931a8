"""What makes a score of a task better than the model: examples of an evaluation that were trained
on, and labels that stand in the input.

    findings = leakage.find('classification', {'train': train, 'validation': held_out})
    leakage.warn(findings)                       # a sentence each

Examples are canonical ones (`lm.data.examples.kinds`). Nothing is removed; that is the user's to
decide, and to report.
"""
import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Any

import numpy as np

from lm.evaluation import overlap

Examples = Sequence[Mapping[str, Any]]

TRAIN = 'train'
SHOWN = 5  # examples of a finding
NEARLY_ALL = 0.9
FEW = 20  # examples of a label, or of a set, below which its words say nothing
PAIRED = 'classification', 'similarity'  # kinds whose examples may have two texts, a and b
_WORD = re.compile(r'\w+')
_CAMEL = re.compile(r'(?<=[a-z])(?=[A-Z])')


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something to know before a number is cited.

  what: its name.  split: where.  count: how many of its `of` examples.  sentence: for a warning.
  examples: a few of them, with the 'id's and texts concerned.
  """
  what: str
  split: str
  count: int
  of: int
  sentence: str
  examples: Sequence[Mapping[str, Any]]


def find(kind: str, splits: Mapping[str, Examples],
         verbalisers: Mapping[str, str] | None = None) -> list[Finding]:
  """Looks for overlap of the splits with 'train', and for labels that the input gives away.

  Args:
    kind: name of the examples' kind, 'classification' etc.
    splits: canonical examples by the name of their split.
    verbalisers: what a label is called in a text; by default its name, in words.
  """
  kept = {name: examples for name, examples in splits.items() if len(examples)}
  texts = {name: overlap.Texts([text(kind, example) for example in examples])
           for name, examples in kept.items()}
  findings = []
  for name, examples in kept.items():
    findings += _repeated(kind, name, examples, texts[name])
    if name != TRAIN and TRAIN in kept:
      findings += _overlap(kind, name, kept, texts)
  findings += _contradictions(kind, kept, texts)
  for name, examples in kept.items():
    if kind == 'classification':
      findings += _label_in_input(name, examples, verbalisers or {})
      findings += _telling_words(name, examples)
      findings += _telling_numbers(name, examples)
    elif kind == 'generation':
      findings += _target_in_source(name, examples)
  return findings


def warn(findings: Sequence[Finding], say: Callable[[str], Any] = print):
  """Says each finding in one sentence."""
  for finding in findings:
    say(f'warning: {finding.sentence}')


def text(kind: str, example: Mapping[str, Any]) -> str:
  """What a model reads of an example; of similar texts in one order."""
  if kind == 'similarity':
    return '\n'.join(sorted((example['a'], example['b'])))
  if kind == 'multiple_choice':
    return '\n'.join(dict.fromkeys(example['contexts'])) + '\n' + '\n'.join(
        example['continuations'])
  fields = {'classification': ('a', 'b'), 'span_extraction': ('question', 'context'),
            'generation': ('source',), 'retrieval': ('query',), 'language_modelling': ('text',),
            'tagging': ('words',)}[kind]
  found = [example[field] for field in fields if field in example]
  return '\n'.join(part if isinstance(part, str) else ' '.join(part) for part in found)


def _answer(kind, example) -> Any:
  """What must be the same for the same text; None where it need not be."""
  fields = {'classification': 'label', 'similarity': 'score', 'tagging': 'tags',
            'multiple_choice': 'label'}
  return example[fields[kind]] if kind in fields else None


def _finding(what, split, where, of, sentence, examples) -> list[Finding]:
  """One finding, or none; `sentence` is said with count and share for {}."""
  count = len(where)
  share = 100 * count / max(of, 1)
  said = sentence.format(f'{count:,} of {of:,} ({f"{share:.1f}" if share >= 0.1 else "< 0.1"} %)')
  return [Finding(what, split, count, of, said, list(examples))] if count else []


def _overlap(kind, name, splits, texts) -> Iterator[Finding]:
  """Examples of a split that stand in the training split."""
  examples, train, own = splits[name], splits[TRAIN], texts[name]
  same = overlap.same(own, texts[TRAIN])
  seen = {int(i) for i in same.where}
  kinds = [('same text', same, f'{{}} examples of {name} stand in train word for word; a model '
            'may know them by heart, remove them from train')]
  kinds.append(('nearly the same text', overlap.near(own, texts[TRAIN]),
                f'{{}} examples of {name} are nearly the same as one of train (Jaccard similarity '
                f'of {overlap.NEAR} or more); remove those of train'))
  kinds.append(('same passage', overlap.passages(own, texts[TRAIN]),
                f'{{}} examples of {name} share {overlap.PASSAGE} words in a row with one of '
                'train; remove those of train'))
  for i, (what, found, sentence) in enumerate(kinds):
    where = [int(j) for j in found.where if i == 0 or int(j) not in seen]
    seen |= set(where)
    shown = [_pair(kind, examples[j], train[found.place[j]]) for j in where[:SHOWN]]
    yield from _finding(what, name, where, len(examples), sentence, shown)
  if kind in PAIRED and all('b' in example for example in (*examples, *train)):
    halves = overlap.Texts([example[side] for example in train for side in 'ab'])
    found = [overlap.same(overlap.Texts([e[side] for e in examples]), halves) for side in 'ab']
    where = [i for i in range(len(examples)) if i not in seen
             and max(one.place[i] for one in found) >= 0]
    shown = [_pair(kind, examples[i], train[max(one.place[i] for one in found) // 2])
             for i in where[:SHOWN]]
    yield from _finding('one of two texts', name, where, len(examples),
                        f'{{}} examples of {name} have one of their two texts in train, in another '
                        'pair; split by text, or say so', shown)


def _pair(kind, example, other):
  return {'id': example.get('id'), 'text': text(kind, example), 'train_id': other.get('id'),
          'train_text': text(kind, other), 'answer': _answer(kind, example),
          'train_answer': _answer(kind, other)}


def _repeated(kind, name, examples, texts) -> list[Finding]:
  """Examples that stand in one split more than once."""
  _, first, inverse = np.unique(texts.identities, return_index=True, return_inverse=True)
  where = [i for i in range(len(examples)) if texts.identities[i] and first[inverse[i]] != i]
  shown = [{'id': examples[i].get('id'), 'text': text(kind, examples[i])} for i in where[:SHOWN]]
  return _finding('repeated', name, where, len(examples),
                  f'{{}} examples of {name} repeat the text of an earlier one; each counts, and '
                  'intervals take them for independent', shown)


def _contradictions(kind, splits, texts) -> Iterator[Finding]:
  """The same text with different labels, in any splits; of tags the same words as they stand."""
  answers = collections.defaultdict(list)
  for name, examples in splits.items():
    for identity, example in zip(texts[name].identities.tolist(), examples):
      if identity:
        answers[tuple(example['words']) if kind == 'tagging' else identity].append((name, example))
  scores = [e['score'] for examples in splits.values() for e in examples if 'score' in e]
  limit = 0.2 * (max(scores) - min(scores)) if scores else 0

  def differ(members):
    found = [_answer(kind, example) for _, example in members]
    if kind == 'similarity':
      return max(found) - min(found) > limit
    return any(one != found[0] for one in found)

  groups = [members for members in answers.values() if len(members) > 1 and differ(members)]
  for name, examples in splits.items():
    own = [members for members in groups if name in {split for split, _ in members}]
    shown = [{'text': text(kind, members[0][1]), 'answers': [
        (split, example.get('id'), _answer(kind, example)) for split, example in members]}
             for members in own[:SHOWN]]
    where = [split for members in own for split, _ in members if split == name]
    yield from _finding('contradiction', name, where, len(examples),
                        f'{{}} examples of {name} have a text that stands elsewhere with another '
                        'label; no model can be right about all of them', shown)


def _words(example) -> set[str]:
  """Words of the input in lower case, digits as '#', so that neg17 and neg18 are one."""
  return {re.sub(r'\d+', '#', word)
          for word in _WORD.findall(text('classification', example).lower())}


def _label_in_input(name, examples, verbalisers) -> list[Finding]:
  """Inputs that hold the name of their own label, and not those of most others."""
  labels = sorted({example['label'] for example in examples})
  names = {label: _spaced(verbalisers.get(label, label)) for label in labels}
  if len(labels) < 2 or len(examples) < FEW:
    return []
  inputs = [_spaced(text('classification', example)) for example in examples]
  where = [i for i, example in enumerate(examples) if names[example['label']] in inputs[i]]
  if len(where) < NEARLY_ALL * len(examples):
    return []
  # A prompt that lists all labels gives none away.
  others = np.mean([names[label] in inputs[i] for i in where for label in labels
                    if label != examples[i]['label']])
  if others > 0.5:
    return []
  shown = [{'id': examples[i].get('id'), 'text': text('classification', examples[i]),
            'label': examples[i]['label']} for i in where[:SHOWN]]
  return _finding('label in the input', name, where, len(examples),
                  f'{{}} examples of {name} hold the name of their own label in the input; take it '
                  'out of the template or the field', shown)


def _spaced(string) -> str:
  """Words in lower case with single spaces around; 'PlayMusic' and 'play_music' are two."""
  words = _WORD.findall(_CAMEL.sub(' ', string).replace('_', ' ').lower())
  return f' {" ".join(words)} '


def _telling_words(name, examples) -> Iterator[Finding]:
  """Words that nearly all examples of a label have, and nearly none of the others."""
  words = [_words(example) for example in examples]
  times = collections.Counter(word for some in words for word in some)
  of_label = collections.defaultdict(list)
  for example, some in zip(examples, words):
    of_label[example['label']].append(some)
  for label, members in of_label.items():
    if not FEW <= len(members) <= len(examples) - FEW:
      continue
    own = collections.Counter(word for some in members for word in some)
    most_others = (1 - NEARLY_ALL) * min(len(members), len(examples) - len(members))
    telling = [(count, word) for word, count in own.items()
               if count >= NEARLY_ALL * len(members) and times[word] - count <= most_others]
    if telling:
      count, word = max(telling)
      where = [i for i, some in enumerate(words) if word in some and examples[i]['label'] == label]
      shown = [{'id': examples[i].get('id'), 'text': text('classification', examples[i]),
                'label': label} for i in where[:SHOWN]]
      yield from _finding('telling word', name, where, len(members),
                          f'the word {word!r} alone tells the label {label!r} in {name}: {{}} '
                          f'of its examples have it, and {times[word] - count:,} others; see '
                          'whether a field that is no text was left in', shown)


def _telling_numbers(name, examples) -> Iterator[Finding]:
  """A number at the beginning or end of nearly all inputs in whose order labels stand together: an
  id that was left in. The label of the example with the next number is what a model would guess."""
  majority = collections.Counter(example['label'] for example in examples).most_common(1)[0][1]
  for side, which in (0, 'first'), (-1, 'last'):
    found = []
    for i, example in enumerate(examples):
      words = _WORD.findall(text('classification', example))
      number = re.search(r'\d+', words[side]) if words else None
      if number:
        found.append((int(number[0]), i))
    distinct = len({number for number, _ in found})
    if len(examples) < FEW or min(len(found), distinct) < NEARLY_ALL * len(examples):
      continue
    labels = [examples[i]['label'] for _, i in sorted(found)]
    right = [i for i, (one, other) in enumerate(zip(labels, labels[1:])) if one == other]
    if len(right) >= NEARLY_ALL * len(labels) and len(right) > (1 + majority) * 1.1:
      shown = [{'id': examples[i].get('id'), 'text': text('classification', examples[i]),
                'label': examples[i]['label']} for _, i in sorted(found)[:SHOWN]]
      yield from _finding('telling number', name, right, len(labels),
                          f'the {which} number of the input tells the label in {name}: {{}} '
                          'examples have the label of the next number; an id was left in', shown)


def _target_in_source(name, examples) -> list[Finding]:
  """Targets that stand in the source, word for word."""
  where = [i for i, example in enumerate(examples)
           if any(_spaced(target) in _spaced(example['source']) for target in example['targets'])]
  if len(examples) < FEW or len(where) < NEARLY_ALL * len(examples):
    return []
  shown = [{'id': examples[i].get('id'), 'text': examples[i]['source'],
            'target': examples[i]['targets'][0]} for i in where[:SHOWN]]
  return _finding('target in the source', name, where, len(examples),
                  f'{{}} examples of {name} have a target that stands in the source; a copy would '
                  'be right', shown)
