"""Who comes in, and in which order."""
import asyncio
import socket

import pytest

from lm import main
from lm.errors import UserError
from lm.serving.admission import ANYONE, Keys, Queue, Rates, Refused
from lm.serving.server import _bound


@pytest.mark.supports('serving', 'fair shares of a model between keys')
def test_names_take_turns_however_much_one_of_them_asks():
  async def run():
    queue, order = Queue(1, 100), []

    async def work(name):
      async with queue.place(name):
        order.append(name)
        await asyncio.sleep(0)
    many = [asyncio.create_task(work('many')) for _ in range(20)]
    await asyncio.sleep(0)
    few = [asyncio.create_task(work('few')) for _ in range(3)]
    await asyncio.gather(*many, *few)
    assert queue.num_running == queue.num_waiting == 0
    return order
  order = asyncio.run(run())
  assert len(order) == 23
  # From when it asks, every second place is for the one that asks seldom.
  assert max(i for i, name in enumerate(order) if name == 'few') <= 7


def test_one_that_leaves_the_queue_takes_no_place():
  async def run():
    queue, order = Queue(1, 3), []

    async def work(number, seconds=0.0):
      async with queue.place('a'):
        order.append(number)
        await asyncio.sleep(seconds)
    first = asyncio.create_task(work(0, 0.05))
    await asyncio.sleep(0)
    others = [asyncio.create_task(work(i)) for i in (1, 2, 3)]
    await asyncio.sleep(0)
    with pytest.raises(Refused, match='3 requests wait already'):
      await work(4)
    others[1].cancel()
    first.cancel()  # and one that works
    await asyncio.gather(first, *others, return_exceptions=True)
    assert queue.num_running == queue.num_waiting == 0
    return order
  assert asyncio.run(run()) == [0, 1, 3]


def test_a_minute_has_so_many_requests_of_each_name():
  now = 0.0
  rates = Rates(60, lambda: now)
  for _ in range(60):
    rates.take('a')
  with pytest.raises(Refused, match='60 requests that a minute allows') as refused:
    rates.take('a')
  assert refused.value.seconds == 1
  rates.take('b')
  now = 1.0
  rates.take('a')
  with pytest.raises(Refused):
    rates.take('a')


def test_keys_are_those_of_the_file(tmp_path):
  path = tmp_path / 'keys'
  path.write_text('\n# a comment\nanna abcdefghijklmnop\n')
  keys = Keys(str(path))
  assert keys.name('abcdefghijklmnop') == 'anna' and keys.are_needed
  assert [keys.name(key) for key in ('', 'abcdefghijklmno', 'anna', '\udcff')] == [None] * 4
  assert Keys(None).name('') == ANYONE
  for text in ('anna short', 'abcdefghijklmnop', 'a b c', ''):
    path.write_text(text)
    with pytest.raises(UserError, match='api_keys='):
      Keys(str(path))


@pytest.mark.parametrize('flags, sentence', [
    ([], 'needs --run_dir=DIR'), (['--model=x'], 'must be NAME=DIR'),
    (['--run_dir=/nowhere/here'], 'no directory'),
    (['--run_dir=.', '--host=0.0.0.0'], 'open to others'),
    (['--run_dir=.', '--gin.D=1'], 'would change'), (['--model=a=.', '--model=a=.'], 'already')])
def test_flags_that_make_no_server_are_told(flags, sentence, capsys):
  assert main.main(['serve', *flags]) == 2
  assert sentence in capsys.readouterr().err


def test_an_answer_does_not_wait_until_its_head_is_acknowledged():
  with _bound('127.0.0.1', 0) as listener, socket.create_connection(listener.getsockname()):
    connection, _ = listener.accept()
    with connection:
      assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
