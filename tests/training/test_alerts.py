"""A command is told what happens to a run, and can neither hold it up nor break it."""
import concurrent.futures
import functools
import json
import os
import socket
import threading
import time

import pytest

from lm.parallel import line as line_lib
from lm.parallel.distributed import Hosts
from lm.training import alerts as alerts_lib
from lm.training.alerts import Alerts
from lm.training.watchdog import Watchdog


def told(path):
  """What a command wrote, a line of JSON each, once it is there."""
  end = time.monotonic() + 20
  while not path.exists() or not path.read_text().endswith('\n'):
    assert time.monotonic() < end
    time.sleep(0.01)
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_command_finds_everything_in_its_environment_and_on_its_input(tmp_path):
  said = []
  alerts = Alerts(f'cat > {tmp_path}/in; env | grep -E "^LM_(RUN|STEP|KIND|MESSAGE)=" | sort > '
                  f'{tmp_path}/env', tmp_path, said.append)
  with alerts.until_the_end():
    alerts.step = 7
    alerts.send('rollback', "it's 5 > 3; $HOME `x`")
  assert told(tmp_path / 'in') == [{'run': str(tmp_path), 'step': 7, 'kind': 'rollback',
                                    'message': "it's 5 > 3; $HOME `x`"}]
  assert (tmp_path / 'env').read_text().splitlines() == [
      'LM_KIND=rollback', "LM_MESSAGE=it's 5 > 3; $HOME `x`", f'LM_RUN={tmp_path}', 'LM_STEP=7']
  assert said == []


def test_a_command_that_hangs_is_killed_with_its_children_and_holds_nothing_up(
    tmp_path, monkeypatch):
  monkeypatch.setattr(alerts_lib, 'SECONDS', 0.5)
  said = []
  alerts = Alerts(f'echo $$ > {tmp_path}/pid; sleep 1000 & echo $! >> {tmp_path}/pid; wait',
                  tmp_path, said.append)
  began = time.monotonic()
  with alerts.until_the_end():
    alerts.send('skipped', 'a')
    assert time.monotonic() - began < 0.4, 'send waited for the command'
  assert time.monotonic() - began < 5
  assert said == ['warning: alert_command failed (it took longer than 0 s)']
  for pid in (tmp_path / 'pid').read_text().split():
    deadline = time.monotonic() + 5
    while os.path.exists(f'/proc/{pid}') and 'Z' not in state_of(pid):
      assert time.monotonic() < deadline, f'{pid} still runs'
      time.sleep(0.02)


def state_of(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().split()[2]
  except OSError:
    return 'Z'


def test_the_end_waits_for_commands_but_not_for_ever(tmp_path, monkeypatch):
  monkeypatch.setattr(alerts_lib, 'SECONDS_AT_END', 0.3)
  alerts = Alerts(f'sleep 0.1; touch {tmp_path}/first; sleep 1000; touch {tmp_path}/second',
                  tmp_path, lambda _: None)
  began = time.monotonic()
  with pytest.raises(ValueError, match='it broke'), alerts.until_the_end():
    raise ValueError('it broke')
  assert time.monotonic() - began < 5 and (tmp_path / 'first').exists()


@pytest.mark.parametrize('command, why', [
    ('echo no network >&2; exit 3', 'ended with status 3, no network'),
    ('not-a-command', 'not found')])
def test_a_command_that_fails_is_a_warning(tmp_path, command, why):
  said = []
  alerts = Alerts(command, tmp_path, said.append)
  with alerts.until_the_end():
    alerts.send('finished', 'x' * 10**6)  # more than a pipe holds, and nobody reads it
  assert len(said) == 1 and why in said[0] and '\n' not in said[0], said


def test_many_alerts_at_once_do_not_become_many_processes(tmp_path):
  said = []
  alerts = Alerts(f'echo 1 >> {tmp_path}/ran; sleep 0.5', tmp_path, said.append)
  with alerts.until_the_end():
    for _ in range(50):
      alerts.send('skipped', 'again')
  assert len((tmp_path / 'ran').read_text().splitlines()) == alerts_lib.AT_ONCE
  assert len(said) == 50 - alerts_lib.AT_ONCE


def test_a_failure_and_a_stuck_step_are_told(tmp_path):
  alerts = Alerts(f'cat >> {tmp_path}/in', tmp_path, lambda _: None)
  with pytest.raises(KeyError), alerts.until_the_end():
    with Watchdog(tmp_path, Hosts(), 0.2, stream=open(os.devnull, 'w'),
                  alert=lambda step, text: alerts.send('stuck', text, step)) as watch:
      watch.beat(41)
      [stuck] = told(tmp_path / 'in')
    raise KeyError('lost')
  assert (stuck['kind'], stuck['step']) == ('stuck', 41)
  assert 'in step 41 for 0 s' in stuck['message']
  assert told(tmp_path / 'in')[1]['kind'] == 'failed'


def test_no_command_is_no_alert(tmp_path):
  alerts = Alerts(None, tmp_path, lambda text: pytest.fail(text))
  with alerts.until_the_end():
    alerts.send('finished', 'x')


def test_a_host_that_is_gone_is_told_before_the_others_end(tmp_path):
  """Host 1 closes its connection without a word; host 0 would then end its process."""
  ended = threading.Event()
  alerts = Alerts(f'cat > {tmp_path}/in', tmp_path, lambda _: None)
  with socket.create_server(('localhost', 0)) as server:
    address = 'localhost', server.getsockname()[1]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    lines = [pool.submit(line_lib.connect, address, i, 2, 20.0, lambda *_: ended.set())
             for i in range(2)]
    main, other = (line.result() for line in lines)
  main.before_end = functools.partial(alerts.send, 'failed')
  other._peers[0].connection.shutdown(socket.SHUT_RDWR)
  assert ended.wait(20)
  [alert] = told(tmp_path / 'in')
  assert alert['kind'] == 'failed'
  assert 'host 1' in alert['message'] and 'is gone' in alert['message']
