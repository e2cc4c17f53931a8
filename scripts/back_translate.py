"""Paraphrases of a task's training examples: translated by one run, and back by another.

  lm train ... --gin_file=gin/tasks/tatoeba_eng_deu.gin --run_dir=runs/eng_deu    # a T5, or a GPT
  lm train ... --run_dir=runs/deu_eng
  python scripts/back_translate.py --forward=runs/eng_deu --backward=runs/deu_eng \\
      --gin_file=gin/runs/finetune.gin --gin_file=gin/tasks/mr.gin \\
      --gin.INITIAL="'runs/minilm'" --out=paraphrases.jsonl

The gin files are those of the run that it shall augment, which then binds augment.BackTranslation
with this path. Each text is translated `--count` times, drawn at `--temperature`, and each of these
back by the likeliest words. A line of the file: {"id", "text", "paraphrases": [...]}. What comes
back as it was, empty, or twice is left out, and so are texts that are too long for a run's context.
A model that drops words or a "not" gives wrong labels: read some lines before you train on them.
"""
import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
import json
import os
import pathlib
import sys
from typing import Any

from tqdm import tqdm

from lm import run
from lm.data import vocabularies
from lm.data.examples import ExampleTask
from lm.data.examples.augment.base import TEXTS
from lm.errors import UserError
from lm.inference import complete
from lm.inference.sampling import SamplingConfig

Translate = Callable[[Sequence[str], Sequence[int]], list[str | None]]
AT_ONCE = 64  # Texts.


class Translator:
  """A run as a function from (texts, seeds) to texts; None of what is too long for its context."""

  def __init__(self, run_dir: str, sampling: SamplingConfig):
    experiment = run.open_experiment((), (), run_dir)
    _, self._module, self._params = run.load(experiment, run_dir)
    self._vocabulary = vocabularies.load(pathlib.Path(run_dir) / 'vocabulary')
    self._sampling, self._max_length = sampling, experiment.model.max_length
    task = experiment.task
    self._template = getattr(task, 'template', None)
    if getattr(task, 'form', None) == 'decoder':
      self._template = task.decoder_template or self._template

  def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> list[str | None]:
    if self._template is not None:
      texts = [self._template.prompt({'source': text}) for text in texts]
    fits = [i for i, text in enumerate(texts)
            if 0 < len(self._vocabulary.encode(text)) < self._max_length]
    done = complete(self._module, self._params, self._vocabulary, [texts[i] for i in fits],
                    self._sampling, [seeds[i] for i in fits], self._max_length)
    found: list[str | None] = [None] * len(texts)
    for i, completed in zip(fits, done):
      found[i] = completed['text'].strip()
    return found


def texts_of(task: ExampleTask) -> Iterator[tuple[str, str]]:
  """Yields (id, text) of what augmentations may change of the training examples, each text once.

  Raises:
    UserError: the kind has no such text.
  """
  kind, seen = task.kind.name, set()
  if kind not in TEXTS or kind == 'tagging':
    raise UserError(f'examples of {kind} have no text that may be replaced by a paraphrase; take a '
                    'task of another kind')
  for number, (_, record) in enumerate(task.source.records('train')):
    example = task.kind.canonical(record)
    for name in filter(example.__contains__, TEXTS[kind]):
      if example[name] not in seen:
        seen.add(example[name])
        yield str(record.get('id', f'train-{number}')), example[name]


def paraphrase(texts: Sequence[str], forward: Translate, backward: Translate, count: int
               ) -> list[list[str]]:
  """Returns up to `count` paraphrases of each text, none of them twice or the text itself."""
  found: list[dict[str, None]] = [{} for _ in texts]
  for seed in range(count):
    there = [(i, each) for i, each in enumerate(forward(texts, [seed] * len(texts))) if each]
    back = backward([each for _, each in there], [seed] * len(there))
    for (i, _), each in zip(there, back):
      if each and each != texts[i]:
        found[i][each] = None
  return [list(each) for each in found]


def write(path: pathlib.Path, texts: Iterable[tuple[str, str]], forward: Translate,
          backward: Translate, count: int) -> tuple[int, int]:
  """Writes the file, whole or not at all; returns how many texts and paraphrases it has."""
  temporary, numbers = path.with_name(f'{path.name}.{os.getpid()}.part'), [0, 0]
  with open(temporary, 'w', encoding='utf-8') as file:
    rest = iter(tqdm(texts, unit=' texts'))
    while batch := list(itertools.islice(rest, AT_ONCE)):
      found = paraphrase([text for _, text in batch], forward, backward, count)
      for (name, text), each in zip(batch, found):
        row: dict[str, Any] = {'id': name, 'text': text, 'paraphrases': each}
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
        numbers = [numbers[0] + 1, numbers[1] + len(each)]
  os.replace(temporary, path)
  return numbers[0], numbers[1]


def main() -> None:
  """Flags in, one file out."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--forward', required=True, help='run that translates the texts')
  parser.add_argument('--backward', required=True, help='run that translates back')
  parser.add_argument('--gin_file', action='append', required=True, help='of the task; repeatable')
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--count', type=int, default=4, help='paraphrases of a text, at most')
  parser.add_argument('--temperature', type=float, default=0.8, help='of the way there')
  parser.add_argument('--max_new_tokens', type=int, default=128)
  flags, rest = parser.parse_known_args()
  bindings = [tuple(each.removeprefix('--gin.').split('=', 1)) for each in rest]
  if not all(each.startswith('--gin.') and '=' in each for each in rest):
    parser.error(f'unknown: {rest}; bindings are --gin.NAME=VALUE')
  try:
    task = run.open_experiment(flags.gin_file, bindings, None).task
    forward = Translator(flags.forward, SamplingConfig(
        flags.temperature, max_new_tokens=flags.max_new_tokens))
    backward = Translator(flags.backward, SamplingConfig(
        0.0, max_new_tokens=flags.max_new_tokens))
    texts, paraphrases = write(flags.out, texts_of(task), forward, backward, flags.count)
  except (UserError, ValueError) as error:
    sys.exit(f'error: {error}')
  print(f'{flags.out}: {paraphrases} paraphrases of {texts} texts')


if __name__ == '__main__':
  main()
