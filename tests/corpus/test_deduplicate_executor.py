"""The executor's processes, blocks and files decide as `deduplicate.run` does in memory."""
import json
import random

import zstandard

from lm.corpus import collect
from lm.corpus import deduplicate
from lm.corpus import pipeline
from lm.corpus import workers
from lm.corpus import write
from lm.corpus.document import Document

STAGES = (
    deduplicate.URL(keep='longest'), deduplicate.Exact(), deduplicate.MinHash(keep='longest'),
    deduplicate.Paragraphs(), deduplicate.Lines(), deduplicate.Substrings(20))


def corpus():
  """(text, url) of documents that share the whole, nearly the whole, paragraphs and spans."""
  rng = random.Random(0)
  words = [f'word{i}' for i in range(3000)]
  passages = [' '.join(rng.choices(words, k=rng.randint(10, 60))) for _ in range(120)]
  texts = ['\n\n'.join(rng.sample(passages, rng.randint(1, 4))) for _ in range(200)]
  for text in texts[:100]:
    some = text.split(' ')
    some[rng.randrange(len(some))] = 'edited'
    texts.append(' '.join(some))
  texts += rng.choices(texts, k=30)
  rng.shuffle(texts)
  return [(text, f'https://a.org/{rng.randrange(900)}') for text in texts]


def test_the_executor_decides_as_in_memory(tmp_path):
  rows = corpus()
  for part in range(3):
    lines = [json.dumps({'text': text, 'url': url}) for text, url in rows[part * 110:][:110]]
    (tmp_path / f'{part}.jsonl').write_text('\n'.join(lines))
  source = collect.Source(name='texts', files=str(tmp_path / '*.jsonl'))
  made = pipeline.Corpus((source,), STAGES, write.Writer(format='jsonl'))
  pipeline.build(made, tmp_path / 'run', '', workers.Processes(2, 60.0, 4 << 30))
  documents = [Document(str(place), text, url=url) for place, (text, url) in enumerate(rows)]
  for stage in STAGES:
    deduplicate.run(stage, documents)
  written = [json.loads(line)['text'] for path in sorted((tmp_path / 'run' / 'data').iterdir())
             for line in zstandard.open(path, 'rt', encoding='utf-8')]
  kept = [document for document in documents if not document.removed_by]
  assert written == [document.text for document in kept]
  rules = {document.removed_by for document in documents}
  assert rules >= {'url.duplicate', 'exact.duplicate', 'minhash.duplicate', 'paragraphs.duplicate'}
  assert any('substrings.duplicate' in document.verdicts for document in kept)
