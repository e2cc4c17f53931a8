"""Near-duplicates against the exact similarity of all pairs, on pairs planted in real texts."""
import importlib.util
import itertools
import pathlib
import random

import numpy as np
import pytest

from lm.corpus import deduplicate
from lm.corpus.deduplicate import minhash
from lm.corpus.document import Document

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / 'shared' / 'data'


@pytest.fixture(scope='module')
def benchmark():
  """scripts/benchmark_deduplicate.py, which plants pairs and finds all by their shingles."""
  if not SHARED.exists():
    pytest.skip('the data are not beside the repository')
  path = REPOSITORY / 'scripts' / 'benchmark_deduplicate.py'
  spec = importlib.util.spec_from_file_location('benchmark_deduplicate', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def planted(benchmark):
  """A corpus of English and Chinese, and {Jaccard similarity: pairs planted in it}."""
  return benchmark.planted_corpus(SHARED, (0.6, 0.8, 0.8, 0.9), limit=160)


@pytest.mark.supports('documents', 'near-duplicates kept once (MinHash-LSH, verified)')
def test_planted_pairs_are_found_and_others_are_not(benchmark, planted):
  corpus, pairs = planted
  gold = benchmark.exact_pairs(corpus, 0.5)
  reported = benchmark.clustered(deduplicate.MinHash(), corpus)
  assert len(pairs[0.8]) > 250 and len(pairs[0.9]) > 70 and len(pairs[0.6]) > 70
  assert all(abs(gold[pair] - jaccard) < 0.004 for jaccard, some in pairs.items() for pair in some)
  assert len(reported & set(pairs[0.8])) >= 0.98 * len(pairs[0.8])
  assert reported >= set(pairs[0.9]) and not reported & set(pairs[0.6])
  assert sum(gold.get(pair, 0) >= 0.75 for pair in reported) >= 0.98 * len(reported)


def test_recall_near_the_threshold_is_what_the_bands_promise(benchmark, planted):
  """At 0.8 with a threshold of 0.8 - 0.004: what is lost is lost by the bands alone."""
  corpus, pairs = planted
  grouping = deduplicate.MinHash(threshold=0.796)
  promised = grouping.recall(0.8, *grouping.bands)
  found = len(benchmark.clustered(grouping, corpus) & set(pairs[0.8])) / len(pairs[0.8])
  assert abs(found - promised) < 4 * (promised * (1 - promised) / len(pairs[0.8]))**0.5
  assert 0.95 <= promised < 0.99


@pytest.mark.parametrize('threshold', [0.5, 0.7, 0.75, 0.8, 0.9])
def test_bands_are_the_strictest_that_reach_the_recall(threshold):
  grouping = deduplicate.MinHash(threshold=threshold)
  bands, rows = grouping.bands
  assert bands * rows <= grouping.num_hashes
  assert grouping.recall(threshold, bands, rows) >= 0.95
  assert grouping.recall(threshold, grouping.num_hashes // (rows + 1), rows + 1) < 0.95


def test_minima_agree_as_often_as_sets_are_similar(benchmark, planted):
  corpus, pairs = planted
  grouping = deduplicate.MinHash(num_hashes=256)
  for jaccard, some in pairs.items():
    one, other = (np.array(side) for side in zip(*some))
    minima, places = grouping.signatures([Document('', text) for text in corpus])
    assert (places == np.arange(len(corpus))).all()
    agree = (minima[:, one] == minima[:, other]).mean()
    assert abs(agree - jaccard) < 0.006
    across_functions = (minima[:, one] == minima[:, other]).mean(axis=0).std()
    assert across_functions < 1.15 * (jaccard * (1 - jaccard) / 256)**0.5  # They are independent.


def test_similarity_is_exact_up_to_the_size_of_a_sketch_and_near_beyond():
  rng = np.random.default_rng(0)
  sets = [set(rng.integers(0, 2**32, size).tolist()) for size in (1, 7, 300, 900, 5000)]
  sets += [set(list(some)[::3]) | {5, 7, 2**32 - 1} for some in sets] + [{5, 7}]
  sketches = [np.array(sorted(some)[:minhash.SKETCH], np.uint32) for some in sets]
  bounds = np.cumsum([0] + [len(sketch) for sketch in sketches])
  pairs = list(itertools.combinations(range(len(sets)), 2))
  found = minhash.similarities(np.concatenate(sketches), bounds, np.array(pairs).T)
  for (i, j), value in zip(pairs, found):
    exact = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
    fits = max(len(sets[i]), len(sets[j])) < minhash.SKETCH
    assert value == pytest.approx(exact, abs=0 if fits else 0.05), (i, j)


def run(texts, **fields):
  documents = [Document(str(i), text) for i, text in enumerate(texts)]
  deduplicate.run(deduplicate.MinHash(**fields), documents)
  return [document.cluster for document in documents]


def test_clusters_are_linked_by_pairs_and_keep_one_by_the_rule():
  words = [f'w{i}' for i in range(110)]
  texts = ['alone and short', ' '.join(words[:100]), ' '.join(words[5:105]), ' '.join(words[10:]),
           'something else of five words or more', 'Alone, and short!']
  assert run(texts, threshold=0.85) == [0, 1, 1, 1, -1, 0]
  longest = run(texts + [' '.join(words[:108])], threshold=0.85, keep='longest')
  assert longest == [5, 6, 6, 6, -1, 5, 6]
  assert run(texts, threshold=0.95) == [0, -1, -1, -1, -1, 0]


def test_texts_without_words_are_kept():
  assert run(['...', '...', '', '— —', '— —']) == [-1] * 5


def test_what_all_documents_share_gives_pairs_in_proportion_to_them():
  records = np.zeros(10_000, minhash._BAND)
  records['address'] = np.random.default_rng(0).permutation(10_000)
  pairs = deduplicate.MinHash().resolve(records)
  assert len(pairs) < 3 * len(records)
  apart = minhash._pairs(np.array([(1, 5), (2, 6), (1, 7), (2, 8), (3, 9)], minhash._BAND))
  assert apart.tolist() == [(5, 7), (6, 8)]
  slices = deduplicate.MinHash().conclude(pairs)['slice']
  assert np.bincount(slices.astype(int)).max() <= 2 * 1024  # Each verified by itself.


def test_more_duplicates_than_fit_one_slice_are_one_cluster(monkeypatch):
  monkeypatch.setattr(minhash, '_SLICE', 3)
  monkeypatch.setattr(minhash, '_AT_ONCE', 50)
  rng = random.Random(0)
  base = [f'w{i}' for i in range(60)]
  texts = []
  for i in range(40):
    words = list(base)
    words[rng.randrange(60)] = f'x{i}'
    texts.append(' '.join(words))
  assert run(texts, threshold=0.7) == [0] * 40
