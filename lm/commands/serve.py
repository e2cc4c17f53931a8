"""`lm serve`: answers requests over HTTP with the checkpoints of runs, or with artefacts."""
import argparse
import logging
import os
import pathlib
from typing import Any

from lm.errors import UserError


def add_flags(command: argparse.ArgumentParser):
  """Adds those of this command."""
  command.epilog += (
      ' Signals: TERM and INT answer what is there and end; HUP takes the newest checkpoints and '
      'blocklist.')
  command.add_argument('--model', action='append', default=[], metavar='NAME=DIR', help='a run or '
                       'an artefact of `lm export`, and its name in requests; repeatable')
  command.add_argument('--host', default='127.0.0.1', help='any other than loopback needs '
                       '--api_keys')
  command.add_argument('--port', type=int, default=int(os.environ.get('AIP_HTTP_PORT', 8000)),
                       help='8000, or what Vertex AI says')
  command.add_argument('--api_keys', metavar='FILE', help='lines of NAME KEY')
  command.add_argument('--blocklist', metavar='FILE', help='words and phrases, one a line, that no '
                       'request or answer may hold')
  command.add_argument('--harm_filter', metavar='DIR', help='a run or artefact of a classifier '
                       'with a label "harmful", such as gin/experiments/harm_filter.gin makes')
  command.add_argument('--harm_threshold', type=float, default=0.9, metavar='P', help='its '
                       'probability from which a text is refused')
  command.add_argument('--redact', action='store_true', help='replaces e-mail addresses, telephone '
                       'numbers, secrets and the like in requests and answers by <EMAIL> and so on')
  command.add_argument('--requests_a_minute', type=int, metavar='N', help='of each name')
  command.add_argument('--max_waiting', type=int, default=256, metavar='N', help='requests that '
                       'may wait for a model; more get status 429')
  command.add_argument('--max_new_tokens', type=int, default=2048, help='of a text')
  command.add_argument('--max_seconds', type=float, default=120.0, help='of an answer')
  command.add_argument('--max_body', type=int, default=1 << 20, metavar='BYTES')
  command.add_argument('--drain_seconds', type=float, default=30.0, help='for requests that are '
                       'there at the end')
  command.add_argument('--num_rows', type=int, help="texts that are written together; the run's")
  command.add_argument('--cache_tokens', type=int, help="of all texts together; the run's")
  command.add_argument('--max_batch', type=int, default=32, help='texts that an encoder reads '
                       'together')
  command.add_argument('--latency_ms', type=float, default=4.0, help='for which the first waits')


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Serves until a signal ends it."""
  try:
    from lm.serving import admission, answers, app, pool, server
  except ImportError as error:
    raise UserError(f"`lm serve` needs a package that is not there ({error}); `pip install "
                    "'lm[serve]'` brings it") from error
  if bindings:
    raise UserError(f'`lm serve` takes runs as they are, and --gin.{bindings[0][0]} would change '
                    'one; leave it out')
  keys = admission.Keys(args.api_keys)
  if args.host not in ('127.0.0.1', '::1', 'localhost') and not keys.are_needed:
    raise UserError(f'--host={args.host} is open to others, and anyone could ask; give --api_keys')
  limits = answers.Limits(args.max_body, args.max_new_tokens, seconds=args.max_seconds)
  models = []
  for name, directory in _models(args).items():
    spec = {'directory': directory, 'num_rows': args.num_rows, 'cache_tokens': args.cache_tokens,
            'max_batch': args.max_batch, 'latency': args.latency_ms / 1e3}
    # As many as a worker works on at once, and as many again so that it need not wait for one.
    places = 2 * max(args.num_rows or 16, args.max_batch)
    models.append((pool.Served(name, pool.command_of(spec)),
                   admission.Queue(places, args.max_waiting)))
  logging.basicConfig(level=logging.WARNING, format='%(asctime)s %(name)s: %(message)s')
  logging.getLogger('lm.serving.filter').setLevel(logging.INFO)
  service = app.Service(models, keys, admission.Rates(args.requests_a_minute), limits,
                        _guard(args))
  server.serve(service, args.host, args.port, args.drain_seconds)
  return {}


def _guard(args):
  """What judges requests and answers, or None."""
  from lm.serving import admission, guard, pool
  if not (args.blocklist or args.harm_filter or args.redact):
    return None
  if not 0 < args.harm_threshold < 1:
    raise UserError(f'--harm_threshold={args.harm_threshold} must be above 0 and below 1')
  if args.harm_filter and not pathlib.Path(args.harm_filter).is_dir():
    raise UserError(f'--harm_filter={args.harm_filter} is no directory; give the run of a '
                    'classifier, or an artefact of `lm export`')
  spec = {'blocklist': args.blocklist, 'redact': args.redact, 'harm_filter': args.harm_filter,
          'threshold': args.harm_threshold, 'max_batch': args.max_batch, 'latency': 0.0}
  served = pool.Served('filter', pool.command_of(spec, 'serve_filter'))
  return guard.Guard(served, admission.Queue(args.max_batch, args.max_waiting))


def _models(args):
  """Directories by the names of their models."""
  found = {}
  if args.run_dir is not None:
    found[pathlib.Path(args.run_dir).resolve().name] = args.run_dir
  for text in args.model:
    name, equals, directory = text.partition('=')
    if not equals or not name or not directory:
      raise UserError(f'--model={text} must be NAME=DIR')
    if name in found:
      raise UserError(f'--model={text}: there is a model {name!r} already; choose another name')
    found[name] = directory
  if not found:
    raise UserError('`lm serve` needs --run_dir=DIR or --model=NAME=DIR, what it shall serve')
  for directory in found.values():
    if not pathlib.Path(directory).is_dir():
      raise UserError(f'{directory} is no directory; give a run, or an artefact of `lm export`')
  return found
