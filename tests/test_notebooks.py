"""Every notebook runs from its first cell to its last."""
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
COMPUTES = '02', '10'  # longer than they compile: what they run is optimised


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
  if path.name.startswith(COMPUTES):
    monkeypatch.delenv('XLA_FLAGS')
  notebook = nbformat.read(path, as_version=4)
  if 'tpu_compiler' in path.read_text():
    pytest.importorskip('libtpu', reason='the tpu extra is not installed')
  data = ROOT.parent / 'shared' / 'data'
  if '../shared/data' in path.read_text() and not data.exists():
    pytest.skip(f'{data} is not there')
  assert all(not cell.get('outputs') for cell in notebook.cells), 'strip the outputs'
  nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': ROOT}}).execute()
  drawn = [output for cell in notebook.cells for output in cell.get('outputs', ())
           if 'image/png' in output.get('data', {})]
  assert drawn, 'a notebook answers its question by a figure'
