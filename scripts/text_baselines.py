"""What a model that writes text has to beat: the source itself, a dictionary, the first sentence.

  python scripts/text_baselines.py tatoeba_eng_deu      # copy and dictionary
  python scripts/text_baselines.py scitldr              # lead-1

The dictionary puts each word of the source to its likeliest translation under IBM's Model 1 (Brown
et al. 1993, Computational Linguistics 19(2), section 4.1), trained by EM on the training split, in
the order of the source. Prints the metrics that `lm evaluate` has for the same split. Run it in the
repository.
"""
import argparse
import re

import numpy as np

from lm import config
from lm.evaluation import metrics


def words(text: str, language: str) -> list[str]:
  """Words and punctuation, in lower case; of Chinese, characters."""
  pattern = r'[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]'
  return re.findall(pattern if language == 'zh' else r"[\w']+|[^\w\s]", text.lower())


def model_1(pairs: list[tuple[list[str], list[str]]], iterations: int = 5) -> dict[str, str]:
  """The likeliest target word of each source word."""
  ids = [{}, {}]
  number = lambda side, word: ids[side].setdefault(word, len(ids[side]))
  sources, targets, which = [], [], []  # every pair of words that stand together once
  for i, (source, target) in enumerate(pairs):
    for t, word in enumerate(target):
      for other in source:
        sources.append(number(0, other))
        targets.append(number(1, word))
        which.append((i, t))
  sources, targets = np.array(sources), np.array(targets)
  _, place = np.unique(np.array(which), axis=0, return_inverse=True)
  links, link = np.unique(np.stack([sources, targets]), axis=1, return_inverse=True)
  probability = np.ones(links.shape[1])
  for _ in range(iterations):
    share = probability[link]
    share = share / np.bincount(place, share)[place]
    counts = np.bincount(link, share)
    probability = counts / np.bincount(links[0], counts)[links[0]]
  best, names = {}, [list(side) for side in ids]
  for i in np.argsort(probability):
    best[names[0][links[0, i]]] = names[1][links[1, i]]
  return best


def main():
  """Prints a line a baseline."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('task', help='a file of gin/tasks, without .gin')
  args = parser.parse_args()
  task = config.value(f'gin/tasks/{args.task}.gin', 'TASK', True)
  read = lambda split: [task.kind.canonical(record) for _, record in task.source.records(split)]
  train, test = read('train'), read('validation')
  language = task.kind.language
  if args.task == 'scitldr':
    first = lambda text: re.split(r'(?<=[.!?]) (?=[A-Z])', text, maxsplit=1)[0]
    baselines = {'lead-1': [first(example['source']) for example in test]}
  else:
    of = lambda example: (words(example['source'], 'en'), words(example['targets'][0], language))
    dictionary = model_1([of(example) for example in train])
    join = '' if language == 'zh' else ' '
    translate = lambda text: join.join(dictionary.get(word, word) for word in words(text, 'en'))
    baselines = {'copy': [example['source'] for example in test],
                 'dictionary': [translate(example['source']) for example in test]}
  header = {'task': args.task, 'kind': 'generation', 'labels': None, 'split': 'validation',
            'step': 0, 'language': language}
  for name, predictions in baselines.items():
    rows = [{'id': str(i), 'inputs': example['source'], 'targets': example['targets'],
             'prediction': text, 'scores': None}
            for i, (example, text) in enumerate(zip(test, predictions))]
    found = metrics.compute(header, rows)
    shown = ('bleu', 'chrf', 'rouge1', 'rouge2', 'rougeL')
    print(f'{args.task}, {len(rows)} examples, {name}: '
          + ', '.join(f'{key} {found[key]:.4g}' for key in shown))


if __name__ == '__main__':
  main()
