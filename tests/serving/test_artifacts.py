"""What is served from an artefact is what the run says."""
import pathlib

import jaxtyping
import numpy as np
import pytest
from tiny_worker import backend, CONFIGS, LABELS, made, Vocabulary

from lm.commands import serve_filter, serve_worker
from lm.data.vocabularies import ByteVocabulary
from lm.errors import UserError
from lm.export import artifact
from lm.interop import of_run
from lm.serving.reader import Batching, Reader


@pytest.fixture(scope='module')
def onnx(tmp_path_factory):
  """An artefact of the tiny classifier, for ONNX Runtime."""
  return exported(tmp_path_factory.mktemp('artefact') / 'onnx', LABELS)


def exported(out, labels):
  pytest.importorskip('onnxruntime', reason='onnxruntime is in the extra export')
  config = of_run.changed(CONFIGS['classify'], artifact.PLAIN)
  model = artifact.Model(config, config.build(), made('classify')[1], ByteVocabulary(),
                         pathlib.Path('run'), 7, labels)
  jaxtyping.config.update('jaxtyping_disable', True)  # It knows no sizes that are letters.
  artifact.export(model, artifact.find('onnx'), str(out))
  jaxtyping.config.update('jaxtyping_disable', False)
  return out


def answers(reader, texts):
  found = []
  for number, text in enumerate(texts):
    reader.submit({'id': number, 'op': 'classify', 'input': text}, found.append)
  while reader.step() is not None:
    pass
  return [one['scores'] for one in found]


@pytest.mark.supports('serving', 'artefacts of ONNX Runtime')
def test_an_artefact_answers_as_its_run(onnx):
  answer, _, facts = artifact.open_artifact(str(onnx))
  reader = Reader(answer, facts['inputs'], 'classify', Vocabulary(), facts['max_length'],
                  facts['labels'], Batching(4, 0.002))
  texts = ['a', 'some text', 'a longer text than the others']
  for ours, theirs in zip(answers(backend('classify'), texts), answers(reader, texts)):
    assert list(ours) == list(theirs) == list(LABELS)
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], atol=1e-5)


def test_an_artefact_judges_texts(onnx, tmp_path, monkeypatch):
  opened = artifact.open_artifact
  monkeypatch.setattr(artifact, 'open_artifact', lambda path: (
      opened(path)[0], Vocabulary(), opened(path)[2]))
  spec = {'blocklist': None, 'redact': False, 'harm_filter': str(onnx), 'threshold': 0.9,
          'max_batch': 4, 'latency': 0.0}
  with pytest.raises(UserError, match="one must be 'harmful'"):
    serve_filter.load(spec)
  directory = exported(tmp_path / 'onnx', ('harmful', 'other', 'none'))
  judge, found = serve_filter.load(spec | {'harm_filter': str(directory)}), []
  assert judge.facts == {'redacts': False, 'threshold': 0.9, 'measured': []}
  text = 'a text of more bytes than the model reads, so that it is read by halves'
  judge.submit({'id': 1, 'op': 'judge', 'text': text, 'start': 0, 'windows': [(0, 30), (30, 71)],
                'final': True}, found.append)
  judge.submit({'id': 2, 'op': 'judge', 'text': text, 'start': 0, 'windows': [(0, 71)],
                'final': True}, found.append)
  while judge.step() is not None:
    pass
  parts = [text[:30], text[30:], text[:36], text[36:]]
  scores = [one['red'] for one in answers(backend('classify'), parts)]
  np.testing.assert_allclose([one['score'] for one in found],
                             [max(scores[:2]), max(scores[2:])], atol=1e-5)


def test_a_family_that_is_not_served_is_told(onnx, monkeypatch):
  spec = {'directory': str(onnx), 'num_rows': None, 'cache_tokens': None, 'max_batch': 4,
          'latency': 0.0}
  monkeypatch.setattr(serve_worker, 'ABILITIES', {})
  with pytest.raises(UserError, match='holds a classifier, which is not served'):
    serve_worker.load(spec)
