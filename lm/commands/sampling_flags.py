"""Flags of how tokens are chosen, for the commands that write text."""
import argparse
import dataclasses
import pathlib
from typing import Any

from lm import config
from lm.errors import UserError


def add(command: argparse.ArgumentParser):
  """Adds them to the parser of a command."""
  command.add_argument('--max_new_tokens', type=int)
  command.add_argument('--temperature', type=float, help='0 takes the most probable token')
  command.add_argument('--top_k', type=int)
  command.add_argument('--top_p', type=float)
  command.add_argument('--min_p', type=float)
  command.add_argument('--seed', type=int, default=0)


def add_rules(command: argparse.ArgumentParser):
  """Adds those of what a completion must be."""
  command.add_argument('--stop', action='append', metavar='TEXT', help='a completion ends before '
                       'it; repeatable')
  command.add_argument('--regex', help='what a whole completion must match')
  command.add_argument('--json_schema', metavar='FILE', help='what JSON it must be')


def add_decoding(command: argparse.ArgumentParser):
  """Adds that of the way to decode."""
  command.add_argument('--decoding', metavar='NAME', help='a file of gin/decoding, or of your own '
                       'with DECODING, in the place of sampling: beams, contrastive_search, ...')


def file_of(args: argparse.Namespace) -> list[str]:
  """The gin file of --decoding, if it is given."""
  if args.decoding is None:
    return []
  own = args.decoding.endswith('.gin')
  return [args.decoding if own else f'gin/decoding/{args.decoding}.gin']


def decoded(experiment: Any, args: argparse.Namespace) -> Any:
  """The experiment with the way to decode that is asked for.

  Raises:
    UserError: there is no such file, or it says nothing of it.
  """
  if args.decoding is None:
    return experiment
  path, = file_of(args)
  decoding = config.value(path, 'DECODING', True)
  if decoding is None:
    raise UserError(f'--decoding={args.decoding}: {path} binds no DECODING; name a file that does, '
                    'such as those of gin/decoding')
  return dataclasses.replace(experiment, decoding=decoding)


def chosen(args: argparse.Namespace, default: Any) -> Any:
  """The SamplingConfig of a run with what the flags say in its place.

  Raises:
    UserError: a value is out of range.
  """
  from lm.inference.constrain import Rule  # here, so that `lm --help` does not wait for JAX
  names = ('max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p')
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  try:
    if getattr(args, 'stop', None):
      given['stop'] = tuple(args.stop)
    if hasattr(args, 'regex') and (args.regex is not None or args.json_schema):
      schema = pathlib.Path(args.json_schema).read_text('utf-8') if args.json_schema else None
      given['rule'] = Rule(regex=args.regex, json_schema=schema)
    return dataclasses.replace(default, **given)
  except (ValueError, OSError) as error:
    raise UserError(str(error)) from error
