"""Artefacts write, many texts at once, what the run writes of each alone."""
import json

import numpy as np
import pytest

from lm.data.vocabularies import ByteVocabulary
from lm.errors import UserError
from lm.export import artifact, certificate
from lm.inference import generate, SamplingConfig
from lm.inference.requests import Request
from lm.inference.rows import RowEngine

EOS, LENGTH = 1, 24
WISHES = [SamplingConfig(temperature=0, max_new_tokens=9),
          SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=24),
          SamplingConfig(temperature=0.7, repetition_penalty=1.3, max_new_tokens=5)]
LENGTHS = 0, 1, 5, 23, 9, 12, 18, 11


@pytest.fixture(scope='module')
def written(models, tmp_path_factory):
  """The directory of a family's artefact in a format, each made once; no certificate is measured.
  """
  made = {}

  def write(family, form):
    if (family, form) not in made:
      made[family, form] = directory = tmp_path_factory.mktemp('artefact')
      found = artifact.find(form)
      found.write(models[family], directory)
      ByteVocabulary().save(directory / 'vocabulary')
      name = 'T5' if family == 'T5' else family if family == 'Transformer-XL' else 'GPT'
      (directory / certificate.FILE).write_text(json.dumps({
          'format': form, 'family': name, 'max_length': LENGTH, 'files': {},
          'vocabulary': ByteVocabulary().digest}))
    return made[family, form]
  return write


@pytest.mark.supports('export', 'GPT, Llama and T5 as ONNX and SavedModel write many texts at '
                      'once, sampled as by the run')
@pytest.mark.parametrize('form', ['onnx', 'saved_model'])
@pytest.mark.parametrize('family', ['GPT', 'Llama', 'T5'])
def test_texts_that_come_and_go_are_those_of_the_run(models, written, family, form):
  rng, model = np.random.default_rng(0), models[family]
  bos = None if family == 'T5' else 0
  asked = [Request(rng.integers(3, 250, size), WISHES[i % 3], i, EOS, bos, num_top=2)
           for i, size in enumerate(LENGTHS)]
  wanted = generate(model.module, model.params, [x.prompt for x in asked],
                    [x.sampling for x in asked], [x.seed for x in asked], LENGTH, EOS, bos)
  rows, vocabulary, _ = artifact.open_rows(str(written(family, form)), num_rows=5)
  assert rows.vocab_size == 300 and vocabulary.digest == ByteVocabulary().digest
  rows.chunk = min(rows.chunk, 7) if form == 'onnx' and family != 'T5' else rows.chunk
  engine = RowEngine(rows)
  engine.warm_up(constrained=True)
  tickets = []
  for i, request in enumerate(asked):
    tickets.append(engine.submit(request))
    for _ in range(i % 3):
      engine.step()
  tickets[2].cancel()
  while engine.step():
    pass
  for i, (ticket, one) in enumerate(zip(tickets, wanted, strict=True)):
    done = ticket.result(0)
    size = len(done.tokens)
    assert done.tokens.tolist() == one.tokens.tolist()[:size]
    assert (done.stopped, size) == (one.stopped, len(one.tokens)) or i == 2
    np.testing.assert_allclose(done.log_probs, one.log_probs[:size], atol=1e-4)
    assert all(values[0] >= chosen - 1e-4 for (_, values), chosen in zip(
        ticket.top, done.log_probs))


@pytest.mark.parametrize('family', ['Llama', 'T5'])
def test_rows_of_one_length_decode_in_one_call(written, family, monkeypatch):
  rows, _, _ = artifact.open_rows(str(written(family, 'onnx')), num_rows=3)
  for row in range(3):
    rows.read(row, np.arange(3, 5 + row), 9)
  from lm.export import onnx_rows
  calls, run = [], onnx_rows.run
  monkeypatch.setattr(onnx_rows, 'run', lambda *args: calls.append(1) or run(*args))
  alone = rows.extend([0, 1, 2], [7, 8, 9])
  assert len(calls) == 1 and alone.shape == (3, 300)
  rows.drop(1)
  rows.extend([0, 2], [7, 9])
  rows.read(1, np.arange(3, 9), 9)
  rows.extend([2, 1, 0], [7, 8, 9])
  assert len(calls) == {'Llama': 4, 'T5': 6}[family]  # T5: an encoder too; and two lengths


def test_what_writes_no_texts_is_told(written):
  directory = written('Transformer-XL', 'onnx')
  with pytest.raises(UserError, match='holds a Transformer-XL as onnx, which writes no texts'):
    artifact.open_rows(str(directory))
