"""`lm plan`: how to spread a run over devices that are not there.

    lm plan --gin_file=gin/experiments/bert_large.gin --topology=v5e:2x4 --compile=2

Ways to shard the model, to compute again what is not kept, and to cut the batch are estimated from
the traced step (`plan_search.py`), the best of them compiled, one at a time. The fastest that fits
is written as a gin file, to be given as a further --gin_file or included.
"""
import argparse
import dataclasses
import html
import json
import pathlib
import sys
import textwrap
from typing import Any

from lm import run
from lm.commands import compile as compile_command
from lm.commands.plan_search import (Choice, currency, Estimate, money, num_devices, Search,
                                     seconds)
from lm.errors import UserError
from lm.evaluation.report import STYLE
from lm.parallel.topology import Topology

HEADS = ('step s', 'MFU %', 'HBM GiB', 'free GiB', currency(), 'compiled s', 'compiled GiB', 'way')


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Searches, compiles, prints the table, writes plan.gin, plan.json and plan.html into --run_dir
  (or the gin file to --out), and returns what --json holds.

  Raises:
    UserError: the config or the topology is wrong, or nothing fits.
  """
  topology = Topology.parse(args.topology, args.num_slices)
  if topology.chip.platform != 'tpu':
    raise UserError(f'--topology={args.topology} is of no TPUs; `lm plan` knows those alone')
  experiment = run.open_experiment(args.gin_file, bindings, args.run_dir)
  tell = lambda text: print(text, file=sys.stderr, flush=True)
  found = Search(experiment, topology).best(args.keep, tell)
  directory = pathlib.Path(args.run_dir or '.')
  directory.mkdir(parents=True, exist_ok=True)
  rows = [_row(choice, result, experiment, topology, args.tokens) for choice, result in found]
  path = pathlib.Path(args.out) if args.out else directory / 'plan.gin'
  for row, (choice, _) in list(zip(rows, found))[:args.compile]:
    tell(f'compiling {row["way"]}')
    path.write_text(gin_text(choice, experiment))
    row['compiled'] = _compiled(args, bindings, choice.of(experiment), topology, path)
    if 'refused' in row['compiled']:
      tell(row['compiled']['refused'])
  best = min(rows, key=_order)
  if 'refused' in (best['compiled'] or {}):
    raise UserError(f'the compiler refuses every way: {best["compiled"]["refused"]}')
  choice = found[rows.index(best)][0]
  report = f'{caption(experiment, topology, args.tokens)}\n{table(rows, topology)}'
  path.write_text(gin_text(choice, experiment, _header(args, best, topology, report)))
  result = {'topology': topology.name, 'slices': topology.num_slices, 'rows': rows, 'best': best}
  print(report)
  print(f'the fastest{"" if best["compiled"] else ", by the estimates"}: {path}')
  if args.run_dir:
    (directory / 'plan.json').write_text(json.dumps(result, indent=1) + '\n')
    (directory / 'plan.html').write_text(page(result, topology))
    print(f'report: {directory / "plan.html"}')
  return result


def _row(choice: Choice, result: Estimate, experiment, topology, tokens) -> dict[str, Any]:
  train = experiment.train
  step = train.batch_size * train.sequence_length
  flops = step * experiment.model.flops_per_token(train.sequence_length)
  most = num_devices(topology) * topology.chip.peak_flops * seconds(result)
  return {'way': choice.text(), 'choice': dataclasses.asdict(choice), 'mfu': flops / most,
          'hbm_peak_bytes': result.peak_bytes, 'step_seconds': list(result.step_seconds),
          'collective_bytes': dict(result.collective_bytes),
          'money': money(seconds(result), step, tokens or train.num_steps * step, topology),
          'compiled': None}


def _compiled(args, bindings, experiment, topology, path):
  """What the compiler says of a way, or why it refuses it."""
  args = argparse.Namespace(**vars(args) | {'gin_file': [*args.gin_file, str(path)]})
  try:
    result = compile_command.report(args, bindings, experiment, topology, {})
  except UserError as error:
    return {'refused': str(error)}
  names = ('hbm_peak_bytes', 'hbm_bytes', 'step_seconds', 'mfu', 'estimated_cycles',
           'kernel_cycles', 'collective_bytes', 'training_money', 'currency')
  return {name: result[name] for name in names}


def _order(row):
  """The fastest first, of those compiled if there are any."""
  compiled = row['compiled'] or {}
  if 'refused' in compiled:
    return 2, 0.0
  return (0, sum(compiled['step_seconds'])) if compiled else (1, sum(row['step_seconds']))


def gin_text(choice: Choice, experiment: run.Experiment, header: str = '') -> str:
  """A way as a gin file."""
  config = type(experiment.model)
  module = config.__module__.rpartition('.')[2]
  lines = [f'{header}from __gin__ import dynamic_registration', '', 'from lm import run',
           f'from lm.models import {module}', 'from lm.parallel import mesh',
           'from lm.parallel import rules', 'from lm.training import loop', '',
           'run.Experiment.mesh = @mesh.MeshConfig()', 'run.Experiment.rules = @rules.Rules()', '']
  lines += [f'mesh.MeshConfig.{axis} = {size}'
            for axis, size in dataclasses.asdict(choice.mesh).items()]
  lines += ['', f'rules.Rules.embed = {choice.embed!r}',
            f'rules.Rules.opt_embed = {choice.opt_embed!r}', '',
            f'{module}.{config.__name__}.remat = {choice.remat!r}',
            f'loop.TrainConfig.num_microbatches = {choice.num_microbatches}', '']
  return '\n'.join(lines)


def _header(args, row, topology, report):
  files = ' '.join(f'--gin_file={name}' for name in args.gin_file)
  figures = row['compiled'] or row
  low, high = figures['step_seconds']
  by = 'the compiler' if row['compiled'] else 'estimates, not compiled'
  text = (f'Expected, by {by}: {low:.3f} to {high:.3f} s a step and '
          f'{figures["hbm_peak_bytes"] / 2**20:,.0f} MiB of '
          f'{topology.chip.hbm_bytes / 2**20:,.0f} on each device.')
  comment = lambda text: '\n'.join(f'# {line}'.rstrip() for line in text.splitlines())
  wrapped = comment(textwrap.fill(text, 100))
  slices = f' --num_slices={topology.num_slices}' if topology.num_slices > 1 else ''
  return (f'# Written by\n#\n#   lm plan {files} --topology={topology.name}{slices} '
          f'--compile={args.compile}\n#\n{wrapped}\n#\n{comment(report)}\n')


def caption(experiment: run.Experiment, topology: Topology, tokens: float | None) -> str:
  """What the table is of, and how to read it."""
  train = experiment.train
  step = train.batch_size * train.sequence_length
  slices = f'{topology.num_slices} x ' if topology.num_slices > 1 else ''
  of = (tokens or train.num_steps * step) / 1e9
  return (f'{slices}{topology.name}, {num_devices(topology)} devices of '
          f'{topology.chip.hbm_bytes / 2**30:.2f} GiB. Steps of {step:,} tokens; {currency()} are '
          f'for {of:,.1f} billion.\nNo way below needs both more time and more memory of a device '
          'than another. Of two times the\nfirst is of a step that hides all communication, the '
          f'other of one that hides none;\nMFU and {currency()} are halfway between.')


def table(rows: list[dict[str, Any]], topology: Topology) -> str:
  """The ways that no other beats, the fastest first: estimates, and what the compiler says."""
  columns = zip(HEADS, *[_cells(row, topology) for row in rows])
  columns = [column for column in columns if any(column[1:])]  # none is compiled, or has a price
  widths = [max(map(len, column)) for column in columns]
  return '\n'.join('  '.join(cell if cell is line[-1] else cell.rjust(width)
                             for cell, width in zip(line, widths)) for line in zip(*columns))


def _cells(row, topology):
  gib, compiled = lambda size: f'{size / 2**30:.2f}', row['compiled'] or {}
  span = lambda pair: f'{pair[0]:.3f}-{pair[1]:.3f}'
  is_known = 'step_seconds' in compiled
  peak = compiled['hbm_peak_bytes'] if is_known else row['hbm_peak_bytes']
  return (span(row['step_seconds']), f'{100 * row["mfu"]:.1f}', gib(row['hbm_peak_bytes']),
          gib(topology.chip.hbm_bytes - peak), f'{row["money"]:,.0f}' if row['money'] else '',
          span(compiled['step_seconds']) if is_known else 'refused' if compiled else '',
          gib(peak) if is_known else '', row['way'])


def page(result: dict[str, Any], topology: Topology) -> str:
  """The report as one HTML file that loads nothing."""
  rows = compile_command.table('Ways that no other beats in both time and memory', HEADS,
                               [_cells(row, topology) for row in result['rows']])
  title = html.escape(f'A plan for {topology.name}')
  note = ('Estimates of the traced step, and of the compiler; neither was ever compared with a '
          'chip. Of two figures the first is of a step whose communication is all hidden, the '
          'other of one that hides none.')
  return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
          f'<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>'
          f'<p class="soft">{note}</p>\n{_plot(result, topology)}\n{rows}\n</body></html>\n')


def _plot(result, topology):
  """Time against memory of each way, its front as a line; compiled ones filled."""
  points = [(sum(row['step_seconds']) / 2, row['hbm_peak_bytes'], row) for row in result['rows']]
  right, top = 1.05 * max(x for x, _, _ in points), topology.chip.hbm_bytes
  place = lambda x, y: (40 + 560 * x / right, 220 - 200 * y / top)
  marks = []
  for x, y, row in points:
    cx, cy = place(x, y)
    fill = 'currentColor' if row['compiled'] else 'none'
    marks.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{fill}" stroke="currentColor">'
                 f'<title>{html.escape(row["way"])}</title></circle>')
  line = ' '.join('{:.1f},{:.1f}'.format(*place(x, y)) for x, y, _ in points)
  return ('<svg viewBox="0 0 640 250" role="img" aria-label="time against memory">'
          f'<polyline points="{line}" fill="none" stroke="currentColor" opacity="0.4"/>'
          '<path d="M40 20V220H600" fill="none" stroke="currentColor"/>'
          f'<text x="44" y="16">{top / 2**30:.2f} GiB of HBM</text>'
          f'<text x="600" y="240" text-anchor="end">{right:.3f} s a step</text>'
          f'{"".join(marks)}</svg>')
