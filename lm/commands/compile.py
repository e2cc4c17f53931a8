"""`lm compile`: what the train step of a config needs of chips that are not there.

    lm compile --gin_file=gin/experiments/gpt_7b.gin --topology=v5e:16x16

No data is read: the vocabulary has the size that the model has. The compiler works in a process of
its own, which some programs end.
"""
import argparse
from collections.abc import Iterable, Sequence
import html
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from lm import config, run
from lm.errors import UserError
from lm.evaluation.report import STYLE
from lm.parallel import compile_report, remedies
from lm.parallel.hlo import Module
from lm.parallel.topology import Topology
from pallas_kernels.tpu_compiler import ENVIRONMENT


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Compiles, prints the report, writes compile.json and compile.html into --run_dir if there is
  one, and returns what --json holds.

  Raises:
    UserError: the config, the topology or an option is wrong, or the step needs more memory than a
      device has: then it says what would fit.
  """
  topology = Topology.parse(args.topology, args.num_slices)
  experiment = run.open_experiment(args.gin_file, bindings, args.run_dir)
  result = report(args, bindings, experiment, topology, _options(args.option), args.save)
  rows = compile_report.rows(result)
  width = max(len(name) for name, _ in rows)
  print('\n'.join(f'{name:{width}}  {value}' for name, value in rows))
  if args.run_dir:
    directory = pathlib.Path(args.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    config.save(directory / 'config.gin')
    (directory / 'compile.json').write_text(json.dumps(result, indent=1) + '\n')
    (directory / 'compile.html').write_text(page(result))
    print(f'report: {directory / "compile.html"}')
  if args.save:
    print(f'executable: {args.save}, for `lm train --compiled={args.save}`')
  return result


def report(args: argparse.Namespace, bindings: list[tuple[str, str]], experiment: run.Experiment,
           topology: Topology, options: dict[str, str], save: str | None = None) -> dict[str, Any]:
  """What a compiled step needs, from the process that compiles it.

  Args:
    args: of them `gin_file`, `run_dir`, `topology`, `num_slices` and `tokens`, with `bindings` what
      the experiment is made of.

  Raises:
    UserError: the compiler refuses the step, or it needs more memory than a device has.
  """
  with tempfile.TemporaryDirectory() as folder:
    request = {'gin_files': args.gin_file, 'bindings': bindings, 'run_dir': args.run_dir,
               'topology': args.topology, 'num_slices': args.num_slices, 'folder': folder,
               'options': options, 'save': save}
    facts = ask(request | {'kernels': False}, 'facts.json')
    if 'needed_bytes' in facts:
      raise UserError(remedies.explain(experiment, facts, topology))
    text = pathlib.Path(folder, 'program.hlo').read_text()
    module = Module(text)
    has_cycles = topology.chip.clock_hz and module.kernels()
    kernels = ask(request | {'kernels': True}, 'kernels.json') if has_cycles else {}
  return compile_report.make(module, facts, kernels, topology, args.tokens)


def _options(flags: list[str]) -> dict[str, str]:
  options = {}
  for flag in flags:
    name, equals, value = flag.partition('=')
    if not equals:
      raise UserError(f'--option={flag} has no value; write --option=NAME=VALUE')
    options[name] = value
  return options


def ask(request: dict[str, Any], name: str) -> dict[str, Any]:
  """The child's answer.

  Raises:
    UserError: it refused, or the compiler ended it.
  """
  child = subprocess.run([sys.executable, '-m', 'lm.commands.compile_child', json.dumps(request)],
                         env=os.environ | ENVIRONMENT, text=True, capture_output=True, check=False)
  path = pathlib.Path(request['folder'], name)
  if not path.exists():
    said = child.stderr.strip().splitlines() or ['it said nothing']
    fatal = next((line for line in said if line[:1] == 'F' and line[1:5].isdigit()), said[-1])
    raise UserError(f'the compiler ended with status {child.returncode}: {fatal[:400]}')
  answer = json.loads(path.read_text())
  if 'error' in answer:
    raise UserError(answer['error'])
  return answer


def page(result: dict[str, Any]) -> str:
  """The report as one HTML file that loads nothing."""
  title = f'{result["topology"]["name"]}: {result["parameters"]:,} parameters'
  tables = [table('Summary', ('', ''), compile_report.rows(result))]
  tables.append(table('Largest buffers', ('MiB', 'shape', 'made by', 'operation'), [
      (f'{x["bytes"] / 2**20:,.1f}', x['shape'], x['source'], x['operation'][-100:])
      for x in result['largest_buffers']]))
  tables.append(table(
      'Collectives', ('operation', 'MiB', 'times', 'axes', 'overlapped', 'ms', 'of'), [
          (x['op'], f'{x["bytes"] / 2**20:,.2f}', x['times'], ' '.join(x['axes']),
           'yes' if x['overlapped'] else 'no', f'{1e3 * x["seconds"]:.2f}', x['operation'][-80:])
          for x in result['collectives']]))
  tables.append(table('Cycles', ('loop or kernel', 'cycles'), [
      *((name, f'{cycles:,}') for name, cycles in result['estimated_cycles_by_loop'].items()),
      *((f'{x["name"]} x {x["times"]}', f'{x["cycles"] or 0:,} each') for x in result['kernels'])]))
  note = ("The compiler's own estimates: they were never compared with a chip. Of two figures the "
          'first is of a step whose communication is all hidden, the other of one that hides none.')
  return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>'
          f'{html.escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>'
          f'{html.escape(title)}</h1><p class="soft">{note}</p>\n' + '\n'.join(tables) +
          '\n</body></html>\n')


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table of a report, as HTML."""
  row = lambda tag, cells: ''.join(f'<{tag}>{html.escape(str(x).strip())}</{tag}>' for x in cells)
  body = ''.join(f'<tr>{row("td", cells)}</tr>' for cells in rows)
  return (f'<h2>{title}</h2><div class="wide"><table><thead><tr>{row("th", heads)}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')
