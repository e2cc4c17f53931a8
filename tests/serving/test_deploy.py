"""The files that deploy a server are in order, and what they start serves a real run."""
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

from conftest import until
import httpx2 as httpx
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / 'scripts' / 'deploy'
BIN = pathlib.Path(sys.executable).parent
KEY = 'a-key-of-some-length'


def checked(*command):
  if shutil.which(command[0]) is None:
    pytest.skip(f'{command[0]} is not on this machine')
  found = subprocess.run(command, capture_output=True, text=True)
  assert found.returncode == 0, found.stdout + found.stderr


def test_the_dockerfile_passes_hadolint():
  checked(str(BIN / 'hadolint'), str(DEPLOY / 'Dockerfile'))


def test_the_manifests_pass_the_schemas_of_kubernetes():
  checked(str(BIN / 'kubernetes-validate'), '--strict', str(DEPLOY / 'kubernetes.yaml'))


def test_the_unit_passes_systemd(tmp_path):
  unit = tmp_path / 'lm-serve.service'
  unit.write_text((DEPLOY / 'lm-serve.service').read_text().replace('/opt/lm/bin', str(BIN)))
  checked('systemd-analyze', 'verify', str(unit))


@pytest.mark.supports('serving', 'Dockerfile, Kubernetes manifests, systemd unit: linted and run')
def test_what_the_containers_start_serves_a_run(stories, tmp_path):
  entry = next(line for line in (DEPLOY / 'Dockerfile').read_text().splitlines()
               if line.startswith('ENTRYPOINT'))
  deployment = next(yaml.safe_load_all((DEPLOY / 'kubernetes.yaml').read_text()))
  container = deployment['spec']['template']['spec']['containers'][0]
  unit = (DEPLOY / 'lm-serve.service').read_text()
  started = shlex.split(next(line.removeprefix('ExecStart=') for line in unit.splitlines()
                             if line.startswith('ExecStart=')))
  command = yaml.safe_load(entry.removeprefix('ENTRYPOINT'))
  # The unit says the same but for its paths.
  assert [part.partition('=')[0] for part in started[1:3]] == [
      part.partition('=')[0] for part in command[1:3]]
  (tmp_path / 'keys').write_text(f'anna {KEY}\n')
  paths = {'--run_dir=/model': f'--run_dir={stories}', '--port=8000': '--port=0',
           '--host=0.0.0.0': '--host=127.0.0.1',
           '--api_keys=/keys/keys': f'--api_keys={tmp_path}/keys'}
  flags = [paths.get(part, part) for part in [*command[1:], *container['args']]]
  assert set(paths) <= {*command, *container['args']}
  process = subprocess.Popen(
      [sys.executable, '-m', 'lm.main', *flags, '--num_rows=4', '--cache_tokens=512'], cwd=ROOT,
      stdout=subprocess.PIPE, text=True)
  try:
    url = process.stdout.readline().split()[-1]
    for probe in ('startupProbe', 'readinessProbe', 'livenessProbe'):
      assert httpx.get(url + container[probe]['httpGet']['path']).is_success
    body = {'model': 'run', 'prompt': 'Once upon a time', 'max_tokens': 12, 'temperature': 0}
    ask = lambda key: httpx.post(f'{url}/v1/completions', json=body, timeout=60,
                                 headers={'Authorization': f'Bearer {key}'})
    assert ask(KEY).json()['choices'][0]['text'].startswith(', there was a little')
    assert ask('another-key-of-length').status_code == 401
  finally:
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)
  assert until(lambda: not list(pathlib.Path('/proc').glob(f'{process.pid}/task')), 5)
