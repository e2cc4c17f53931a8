"""`lm generate` keeps weights and cache as its flags say."""
import argparse
import dataclasses
import types

import pytest
from test_generate_prompts import Letters, MODEL, params

from lm import main, run, run_directory
from lm.commands import sampling_flags
from lm.inference import complete, SamplingConfig
from lm.inference.decoder import Decoder
from lm.models.cache import CacheOptions

ROTARY = dataclasses.replace(MODEL, positions='rotary', scan_layers=False)
SAMPLING = SamplingConfig(temperature=0, max_new_tokens=12)


@pytest.fixture
def lm(monkeypatch, tmp_path, capsys):
  """Runs the command for a prompt; returns the completion, or what was said."""
  def call(model, *flags):
    weights = params()
    if model.positions == 'rotary':
      weights = {name: x for name, x in weights.items() if name != 'position_embedding'}
    experiment = types.SimpleNamespace(sampling=SAMPLING, model=model, decoding=None)
    monkeypatch.setattr(run, 'open_experiment', lambda *_: experiment)
    monkeypatch.setattr(run, 'load_writer', lambda *_: (7, model.build(), weights, None))
    monkeypatch.setattr(run_directory, 'load_vocabulary', lambda *_: (Letters(), None))
    status = main.main(['generate', '--run_dir=none', '--prompt=abc', *flags,
                        f'--json={tmp_path}/told.json'])
    told = capsys.readouterr()
    return told.err if status else told.out.removeprefix('abc').strip()
  return call


@pytest.mark.supports('decoding', 'weights and KV cache in 8 bits', 'layers on the host')
@pytest.mark.parametrize('flags, kept', [
    (['--weights=int8'], {'weights': 'int8'}), (['--layers_on_host'], {'layers_on_host': True}),
    (['--kv_cache=int8'], {'cache': CacheOptions('int8', True)})])
def test_a_flag_is_a_decoder_that_keeps_them_so(lm, flags, kept):
  decoder = Decoder(MODEL.build(), **kept)
  one, = complete(decoder, params(), Letters(), ['abc'], SAMPLING, 0, 32)
  assert lm(MODEL, *flags) == one['text'].strip() != ''
  parser = argparse.ArgumentParser()
  sampling_flags.add_storage(parser)
  assert sampling_flags.stored(parser.parse_args(flags), MODEL.build()) == decoder


def test_a_window_out_of_range_is_refused(lm):
  assert '--kv_window: window=0 must be at least 1' in lm(MODEL, '--kv_window=0')


@pytest.mark.supports('decoding', 'texts beyond the context: window and sinks')
def test_with_a_window_a_text_goes_on_beyond_the_context(lm):
  assert len(lm(ROTARY, '--max_new_tokens=50')) < 32
  assert len(lm(ROTARY, '--max_new_tokens=50', '--kv_window=8')) == 50
