"""What the tests of whole runs share."""
import guarded_runs as runs
import pytest


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
  """Texts, and the cache of them."""
  folder = tmp_path_factory.mktemp('texts')
  runs.write_texts(folder)
  runs.experiment(folder).task.prepare()
  return folder
