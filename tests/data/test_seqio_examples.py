"""Tasks of labelled examples in SeqIO's registry, in a process of their own."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CODE = '''
import json, sys
from lm.data import examples, mixtures, vocabularies
import numpy as np
import seqio

def made(form, **changes):
  source = examples.Files(sys.argv[1], sys.argv[1])
  template = examples.Template('sort: {a}', '{label}' if form == 'text_to_text' else ' {label}')
  return examples.ExampleTask(source, examples.Classification(), form=form, template=template,
      vocabulary=vocabularies.VocabularyConfig('byte'), cache_dir=sys.argv[2], name=form, **changes)

out = {}
for form in ('text_to_text', 'decoder'):
  task = made(form)
  for _ in range(2):  # A second time replaces the first.
    registered = task.register()
  data = registered.get_dataset({'inputs': 64, 'targets': 32}, 'train', shuffle=False)
  found = [[row['inputs'].tolist(), row['targets'].tolist()] for row in data.as_numpy_iterator()]
  prepared = task.prepare(progress=False)
  stored = [prepared.cache('train').encoded(i) for i in range(len(found))]
  eos = [prepared.vocabulary.eos_id]
  expected = [[e.a.tolist() + (eos if form == 'text_to_text' else []), e.targets.tolist() + eos]
              for e in stored]
  assert found == expected and len(found) == 4
  converter = (seqio.EncDecFeatureConverter if form == 'text_to_text' else
               seqio.PrefixLMFeatureConverter)(pack=True)
  rows = converter(registered.get_dataset({'inputs': 64, 'targets': 32}, 'train', shuffle=False),
                   {'inputs': 64, 'targets': 32})
  assert len(list(rows)) >= 1
  targets = [registered.postprocess_fn(None, example=row, is_target=True)
             for row in data.as_numpy_iterator()]
  metric, = registered.metric_fns
  out[form] = {key: metric(targets, texts) for key, texts in {
      'right': [' sun', 'rain', 'sun', 'rain'], 'half': ['sun', 'sun', 'sun', 'what']}.items()}
try:
  made('encoder').register()
except Exception as error:
  out['refused'] = str(error)
print(json.dumps(out))
'''


@pytest.mark.slow
@pytest.mark.supports('data', 'SeqIO tasks of labelled examples, with their metrics')
def test_the_task_is_a_seqio_task_of_the_same_ids(tmp_path):
  path = tmp_path / 'some.jsonl'
  path.write_text(''.join(json.dumps({'a': f'text {i}', 'label': 'rain' if i % 2 else 'sun'}) + '\n'
                          for i in range(4)))
  done = subprocess.run([sys.executable, '-c', CODE, str(path), str(tmp_path / 'cache')],
                        capture_output=True, text=True, cwd=REPOSITORY,
                        env=dict(os.environ, TF_CPP_MIN_LOG_LEVEL='3', PYTHONPATH=str(REPOSITORY)))
  assert not done.returncode, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  for form in ('text_to_text', 'decoder'):
    assert found[form]['right']['accuracy'] == 1 and found[form]['half']['accuracy'] == 0.5
  assert "form='encoder' of 'encoder' has no prompts" in found['refused']
