"""Decoding with a cache is the full forward pass on every mesh, for every family."""
import pathlib

import pytest


@pytest.mark.supports('decoding', 'caches on meshes: rows over data, heads over tensor')
def test_decoding_on_a_mesh_is_the_full_forward_pass_on_one_device(child_with_devices):
  script = pathlib.Path(__file__).parent / 'sharded_caches.py'
  found = child_with_devices(script)
  assert len(found) == 12
  shares_heads = 'rotary, grouped on tensor', 'sinks on tensor'  # 2 key-value heads, 4 devices
  for case, (difference, cut) in found.items():
    assert difference < 1e-4, (case, difference)
    assert ('tensor' in cut) == (case not in shares_heads), (case, cut)
    assert ('fsdp' if case.endswith('fsdp') else 'data') in cut, (case, cut)
