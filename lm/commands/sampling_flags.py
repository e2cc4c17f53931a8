"""Flags of how tokens are chosen, for the commands that write text."""
import argparse
import dataclasses
from typing import Any

from lm.errors import UserError


def add(command: argparse.ArgumentParser):
  """Adds them to the parser of a command."""
  command.add_argument('--max_new_tokens', type=int)
  command.add_argument('--temperature', type=float, help='0 takes the most probable token')
  command.add_argument('--top_k', type=int)
  command.add_argument('--top_p', type=float)
  command.add_argument('--seed', type=int, default=0)


def chosen(args: argparse.Namespace, default: Any) -> Any:
  """The SamplingConfig of a run with what the flags say in its place.

  Raises:
    UserError: a value is out of range.
  """
  names = ('max_new_tokens', 'temperature', 'top_k', 'top_p')
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  try:
    return dataclasses.replace(default, **given)
  except ValueError as error:
    raise UserError(str(error)) from error
