"""Load on `lm serve`, over loopback: throughput, latencies, what is shed, memory.

  python scripts/benchmark_serving.py --run_dir=R              # completions of a GPT
  python scripts/benchmark_serving.py --run_dir=R --plain=A    # embeddings; A: ONNX artefact
  python scripts/benchmark_serving.py --run_dir=R --soak=10000 # whether memory grows, no timing

First one client, then 16 that ask as soon as they are answered: what batching brings; and four
times as many: the capacity. With --plain the same 16 ask ONNX Runtime behind a plain FastAPI
application, in turns with ours. Then requests that come whether or not others are answered (Poisson
arrivals) at 0.5, 0.8 and 1.5 of the capacity: milliseconds to the first piece, and for each piece
behind it (up to 8 tokens), the 50th and 99th percentile; how many were refused (status 429), and
whether any that was accepted was lost. Last the memory of server and worker, before and after.
--out=FILE.html draws it.

--soak sends so many completions of a GPT instead, by 16 clients: of many lengths, streamed or not,
with log-probabilities, scored, left by their client in the middle, or malformed; every thousand it
prints the memory.
"""
import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time

from lm.evaluation import plot

WORDS = 'a the old young man girl dog house saw met loved and in on of with green blue'.split()
TEXTS = [' '.join(random.Random(i).choices(WORDS, k=12)) for i in range(256)]
HEAD = ('POST {path} HTTP/1.1\r\nHost: lm\r\nContent-Type: application/json\r\n'
        'Content-Length: {size}\r\n\r\n')
PLAIN = '''
import sys, uvicorn, numpy as np, onnxruntime, json, pathlib
from fastapi import FastAPI, Request
from lm.data import vocabularies
directory = pathlib.Path(sys.argv[1])
session = onnxruntime.InferenceSession(str(next(directory.rglob('*.onnx'))))
vocabulary, app = vocabularies.load(directory / 'vocabulary'), FastAPI()
names = [one.name for one in session.get_inputs()]

@app.post('/v1/embeddings')
def embed(form: dict):
  ids = vocabulary.encode_pair(form['input']).ids[None]
  arrays = {'input_ids': ids, 'attention_mask': np.ones_like(ids), 'token_type_ids': ids * 0}
  kinds = {one.name: one.type for one in session.get_inputs()}
  arrays = {name: arrays[name].astype('int64' if '64' in kinds[name] else 'int32')
            for name in names}
  outputs = dict(zip([one.name for one in session.get_outputs()], session.run(None, arrays)))
  return {'data': [{'embedding': outputs['sentence_embedding'][0].tolist()}]}

print('serves plain at http://127.0.0.1:' + sys.argv[2], flush=True)
uvicorn.run(app, host='127.0.0.1', port=int(sys.argv[2]), log_level='warning', access_log=False)
'''


class Answer:
  """Of a request: its status, when it was sent, and when each piece of it came."""

  def __init__(self):
    self.status, self.sent, self.pieces, self.is_whole = 0, time.perf_counter(), [], False

  @property
  def seconds(self):
    return self.pieces[-1] - self.sent

  @property
  def first(self):
    return self.pieces[0] - self.sent


class Client:
  """Connections to a server, each for one request at a time."""

  def __init__(self, port, path):
    self._port, self._path, self._free = port, path, []

  async def ask(self, body, leaves=False):
    """Sends a request, an object or bytes; reads the answer to its end, or of a stream the first
    piece alone."""
    data, answer = body if isinstance(body, bytes) else json.dumps(body).encode(), Answer()
    reader, writer = self._free.pop() if self._free else (
        await asyncio.open_connection('127.0.0.1', self._port, limit=1 << 22))
    writer.write(HEAD.format(path=self._path, size=len(data)).encode() + data)
    head = (await reader.readuntil(b'\r\n\r\n')).decode().lower()
    answer.status = int(head.split()[1])
    if 'transfer-encoding: chunked' in head:
      while size := int(await reader.readline(), 16):
        await reader.readexactly(size + 2)
        answer.pieces.append(time.perf_counter())
        if leaves:
          writer.close()
          return answer
      await reader.readline()
    else:
      size = next(line for line in head.split('\r\n') if line.startswith('content-length'))
      await reader.readexactly(int(size.split(':')[1]))
      answer.pieces.append(time.perf_counter())
    answer.is_whole = True
    self._free.append((reader, writer))
    return answer


@contextlib.contextmanager
def server(*command):
  """Starts a server; gives its port and process."""
  process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
  try:
    for line in process.stdout:
      if line.startswith('serves '):
        break
    yield int(line.rsplit(':', 1)[1]), process
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait()


def body(args, number, stream):
  """A request, and about how long its answer is."""
  rng = random.Random(number)
  if args.plain:
    return {'model': args.model, 'input': rng.choice(TEXTS)}
  return {'model': args.model, 'prompt': rng.choice(TEXTS), 'seed': number, 'stream': stream,
          'max_tokens': max(4, min(64, round(rng.lognormvariate(3, 0.7))))}


async def closed(client, args, clients, seconds):
  """Requests a second of so many clients that ask as soon as they are answered."""
  end, done = time.perf_counter() + seconds, 0

  async def one(number):
    nonlocal done
    while time.perf_counter() < end:
      answer = await client.ask(body(args, number, False))
      assert answer.status == 200, answer.status
      done += 1
      number += clients
  await asyncio.gather(*map(one, range(clients)))
  return done / (time.perf_counter() - end + seconds)


def soaking(args, number):
  """Of a request of the soak: its kind, its body, and whether the client leaves."""
  rng = random.Random(number)
  prompt = ' '.join(rng.choices(WORDS, k=rng.randint(1, 60)))
  fields = body(args, number, False) | {'prompt': prompt}
  data = json.dumps(fields).encode()
  kinds = {
      'whole': fields, 'streamed': fields | {'stream': True},
      'left': fields | {'stream': True, 'max_tokens': 200},
      'log-probabilities': fields | {'logprobs': 5}, 'rule': fields | {'regex': '[a-z]{1,9}'},
      'score': {**fields, 'max_tokens': 0, 'echo': True, 'logprobs': 2, 'stream': False},
      'malformed': rng.choice([
          data[:-9], b'\xff' + data, b'[' * 900, b'', data.replace(b'"seed": ', b'"seed": 1e999'),
          json.dumps(fields | {'tempreture': 1}).encode(),
          json.dumps(fields | {'top_p': 7}).encode(),
          json.dumps(fields | {'prompt': 'a' * 20_000}).encode()])}
  kind = rng.choices(list(kinds), [40, 20, 10, 10, 3, 7, 10])[0]
  return kind, kinds[kind], kind == 'left'


async def soak(client, args, process):
  """Sends all, and prints the memory; returns it, and how many of each kind got which status."""
  numbers, statuses, sizes = itertools.count(), collections.Counter(), [memory(process)]

  async def one():
    while (number := next(numbers)) < args.soak:
      kind, fields, leaves = soaking(args, number)
      answer = await client.ask(fields, leaves)
      statuses[f'{kind}: {answer.status}'] += 1
      if statuses.total() % 1000 == 0:
        sizes.append(memory(process))
        print(f'{statuses.total():6} requests: server and worker ' + ', '.join(
            f'{size:.1f}' for size in sizes[-1]) + ' MB', flush=True)

  await asyncio.gather(*(one() for _ in range(args.clients)))
  print(', '.join(f'{kind} {count}' for kind, count in sorted(statuses.items())))
  return {'memory': sizes, 'statuses': statuses}


async def opened(client, args, rate, seconds):
  """Answers to requests that come by themselves, `rate` a second."""
  rng, tasks, due = random.Random(0), [], time.perf_counter()
  end = due + seconds
  while (due := due + rng.expovariate(rate)) < end:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))  # late ones follow at once
    tasks.append(asyncio.create_task(client.ask(body(args, len(tasks), not args.plain))))
  return await asyncio.gather(*tasks, return_exceptions=True)


def percentile(values, share):
  return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float('nan')


def summary(share, rate, answers):
  """A row of the table."""
  taken = [x for x in answers if not isinstance(x, Exception) and x.status == 200]
  refused = [x for x in answers if not isinstance(x, Exception) and x.status == 429]
  first = [1e3 * x.first for x in taken]
  each = [1e3 * (x.seconds - x.first) / (len(x.pieces) - 1) for x in taken if len(x.pieces) > 1]
  return {'share': share, 'rate': rate, 'sent': len(answers), 'answered': len(taken),
          'refused': len(refused), 'lost': len(answers) - len(taken) - len(refused),
          'first_p50': percentile(first, 0.5), 'first_p99': percentile(first, 0.99),
          'piece_p50': percentile(each, 0.5), 'piece_p99': percentile(each, 0.99)}


def memory(process):
  """Megabytes of the server, and of its worker."""
  children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
  size = lambda pid: next(int(line.split()[1]) for line in open(f'/proc/{pid}/status')
                          if line.startswith('VmRSS')) / 1e3
  return [size(pid) for pid in (process.pid, *children)]


async def measure(args, port, process, plain_port):
  """Prints the figures; returns them."""
  path = '/v1/embeddings' if args.plain else '/v1/completions'
  # Each time with connections of its own: a server hangs up on those that nobody uses.
  ours, plain = (lambda: Client(port, path)), (lambda: Client(plain_port, path))
  if args.soak:
    return await soak(ours(), args, process)
  await closed(ours(), args, 4, 2)
  before = memory(process)
  alone = await closed(ours(), args, 1, args.seconds)
  together = await closed(ours(), args, args.clients, args.seconds)
  print(f'one client {alone:.1f} requests a second, {args.clients} clients {together:.1f}: '
        f'{together / alone:.2f}x')
  most = await closed(ours(), args, 4 * args.clients, args.seconds)
  print(f'{4 * args.clients} clients {most:.1f} requests a second, which is the capacity')
  found = {'alone': alone, 'together': together, 'capacity': most}
  if plain_port:
    turns = []
    await closed(plain(), args, 4, 2)
    for _ in range(3):
      turns.append([await closed(client(), args, args.clients, args.seconds)
                    for client in (ours, plain)])
    ratio = statistics.median(a / b for a, b in turns)
    print(f'ours against ONNX Runtime behind FastAPI: {ratio:.2f}x (' + ', '.join(
        f'{a:.1f} and {b:.1f}' for a, b in turns) + ' requests a second)')
    found['against_plain'] = ratio
  print('load  rate/s   sent answered refused lost   first piece p50    p99   piece p50    p99 ms')
  found['load'] = []
  for share in (0.5, 0.8, 1.5):
    row = summary(share, share * most,
                  await opened(ours(), args, share * most, args.seconds))
    found['load'].append(row)
    print(f'{share:4}  {row["rate"]:6.1f} {row["sent"]:6} {row["answered"]:8} {row["refused"]:7} '
          f'{row["lost"]:4} {row["first_p50"]:17.1f} {row["first_p99"]:6.1f} '
          f'{row["piece_p50"]:11.2f} {row["piece_p99"]:6.2f}', flush=True)
  after = memory(process)
  print('memory of server and worker, MB: ' + ', '.join(
      f'{a:.0f} then {b:.0f}' for a, b in zip(before, after)))
  return found | {'memory': [before, after]}


STYLE = """body { font: 16px system-ui; max-width: 60rem; margin: 2rem auto }
svg { width: 100%; height: auto } path, polyline { fill: none; stroke-width: 2 }
.c0 { stroke: #1f6f8b } .c1 { stroke: #b3561e } circle { fill: currentColor }"""


def page(found):
  """The milliseconds to the first piece over the load, as HTML."""
  curves = [plot.Series(f'p{share}', [(row['share'], row[f'first_p{share}'])
                                      for row in found['load']], f'c{i}', dots=True)
            for i, share in enumerate((50, 99))]
  chart = plot.line_chart(curves, 'arrivals over capacity', 'ms to the first piece', True)
  return f'<!doctype html><title>Latency under load</title><style>{STYLE}</style>{chart}'


def main():
  """Starts the servers and measures."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run_dir', required=True)
  parser.add_argument('--plain', help='an ONNX artefact of the run, an embedder')
  parser.add_argument('--clients', type=int, default=16)
  parser.add_argument('--seconds', type=float, default=10, help='of each measurement')
  parser.add_argument('--soak', type=int, metavar='N', help='requests, for the memory alone')
  parser.add_argument('--json', help='the figures')
  parser.add_argument('--out', help='a page of the latencies')
  args = parser.parse_args()
  args.model = pathlib.Path(args.run_dir).resolve().name
  with contextlib.ExitStack() as stack:
    port, process = stack.enter_context(server(
        '-m', 'lm.main', 'serve', f'--run_dir={args.run_dir}', '--port=0', '--max_waiting=64'))
    plain_port = None
    if args.plain:
      plain_port, _ = stack.enter_context(server('-c', PLAIN, args.plain, str(port + 1)))
    found = asyncio.run(measure(args, port, process, plain_port))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=1))
  if args.out and not args.soak:
    pathlib.Path(args.out).write_text(page(found))


if __name__ == '__main__':
  main()
