"""`lm edit`: a marked span of a text written anew, and the rest of it kept byte for byte."""
import argparse
import dataclasses
import pathlib
from typing import Any

from lm import run, run_directory
from lm.commands import sampling_flags
from lm.data import objectives
from lm.data.vocabularies import Vocabulary
from lm.errors import UserError
from lm.evaluation import likelihood
from lm.inference import infill
from lm.inference.generate import begin_id
from lm.models.gpt import GPTConfig
from lm.models.t5 import T5Config

# Prefix, middle and suffix in vocabularies of others: StarCoder; Qwen, CodeGemma; DeepSeek; Llama.
FIM_TOKENS = (('<fim_prefix>', '<fim_middle>', '<fim_suffix>'),
              ('<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>'),
              ('<｜fim▁begin｜>', '<｜fim▁end｜>', '<｜fim▁hole｜>'),
              ('▁<PRE>', '▁<MID>', '▁<SUF>'))


@dataclasses.dataclass(frozen=True)
class Marked:
  """A text in three parts: bytes that stay, those to be rewritten, bytes that stay."""
  before: bytes
  span: bytes
  after: bytes

  def rewritten(self, middle: str) -> bytes:
    """The text with another span."""
    return self.before + _to_bytes(middle) + self.after


def marked_text(text: str) -> Marked:
  """A text with its span in double brackets, which are no part of it.

  Raises:
    UserError: it has none, or several.
  """
  before, opening, rest = text.partition('[[')
  span, closing, after = rest.partition(']]')
  if not opening or not closing or '[[' in span + after or ']]' in before + after:
    raise UserError(f'--text={text!r} must mark one span to rewrite in [[double brackets]]; of a '
                    'text that has such brackets itself take --file with --start and --end')
  return Marked(*map(_to_bytes, (before, span, after)))


def marked_file(path: str, start: int | None, end: int | None) -> Marked:
  """A file and the span of its bytes from `start` to `end`.

  Raises:
    UserError: it cannot be read, or has no such span.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f'--file={path} cannot be read ({error.strerror}); give a file') from error
  if start is None or end is None or not 0 <= start <= end <= len(data):
    raise UserError(f'--start={start} and --end={end} mark no span of the {len(data)} bytes of '
                    f'--file={path}; give 0 <= start <= end <= {len(data)}')
  return Marked(data[:start], data[start:end], data[end:])


def sentinels(experiment: run.Experiment, vocabulary: Vocabulary) -> infill.FIM | infill.Spans:
  """The ids with which a run's model is asked for what is missing.

  Raises:
    UserError: its family cannot be asked, or it has no such ids.
  """
  model, objective = experiment.model, experiment.objective
  if isinstance(model, GPTConfig):
    if isinstance(objective, objectives.FillInTheMiddle):
      bound = objective.bind(vocabulary)
      order = 'spm' if objective.spm_rate == 1 else 'psm'
      return infill.FIM(*bound.fim_ids, order, bound.bos_id)
    for names in FIM_TOKENS:
      if all(name in vocabulary.special_tokens for name in names):
        ids = (vocabulary.special_tokens[name] for name in names)
        return infill.FIM(*ids, 'psm', begin_id(vocabulary))
    raise UserError('the vocabulary of this run has no sentinels of prefix, middle and suffix; '
                    'train with objectives.FillInTheMiddle, or convert a model that was')
  if isinstance(model, T5Config) and model.decoder:
    if isinstance(objective, objectives.SpanCorruption):
      return infill.Spans(*map(int, objective.bind(vocabulary).sentinel_ids[:2]))
    if len(vocabulary.sentinel_ids or ()) > 1:
      return infill.Spans(*vocabulary.sentinel_ids[:2])
    raise UserError('the vocabulary of this run has no sentinels (<extra_id_0>); train with '
                    'objectives.SpanCorruption')
  raise UserError(f'a model of {type(model).__name__} cannot fill a span in; take a GPT of '
                  'objectives.FillInTheMiddle, or a T5 of objectives.SpanCorruption')


def execute(args: argparse.Namespace, bindings: list[tuple[str, str]]) -> dict[str, Any]:
  """Rewrites the span; prints the candidates, best first, and returns what --json holds."""
  if (args.text is None) == (args.file is None):
    raise UserError('`lm edit` needs --text=TEXT with a span in [[double brackets]], or '
                    '--file=FILE with --start=BYTE and --end=BYTE; give one of them')
  if args.run_dir is None:
    raise UserError('`lm edit` needs --run_dir=DIR, where the run is')
  if args.candidates < 1:
    raise UserError(f'--candidates={args.candidates} must be at least 1')
  is_text = args.file is None
  marked = marked_text(args.text) if is_text else marked_file(args.file, args.start, args.end)
  experiment = run.open_experiment(args.gin_file, bindings, args.run_dir)
  sampling = sampling_flags.chosen(args, experiment.sampling)
  candidates = edit(experiment, args.run_dir, marked, sampling, args.candidates, args.seed)
  if args.out:
    try:
      pathlib.Path(args.out).write_bytes(marked.rewritten(candidates[0]['span']))
    except OSError as error:
      raise UserError(f'--out={args.out} cannot be written ({error.strerror}); choose another '
                      'file') from error
  for candidate in candidates:
    print(f'{candidate["log_prob"]:10.3f}  {candidate["text" if is_text else "span"]}')
  return {'candidates': candidates}


def edit(experiment: run.Experiment, run_dir: str, marked: Marked, sampling: Any,
         num_candidates: int, seed: int) -> list[dict[str, Any]]:
  """Candidates, the best first: `text`, its `span`, and natural logarithms of probabilities.

  `log_prob` is the whole text's under a decoder, read from its beginning, and decides; of an
  encoder-decoder, or a decoder that has seen no text from its beginning, it is `span_log_prob`,
  that of the span given the rest. `is_whole`: the span ended by itself; those that did come first.
  """
  vocabulary, _ = run_directory.load_vocabulary(pathlib.Path(run_dir), False)
  asked = sentinels(experiment, vocabulary)
  _, module, params = run.load(experiment, run_dir)
  before, after = (part.decode('utf-8', 'replace') for part in (marked.before, marked.after))
  middles = infill.infill(module, params, vocabulary, asked, before, after, sampling,
                          num_candidates, seed, experiment.model.max_length)
  log_probs = [middle.log_prob for middle in middles]
  if isinstance(asked, infill.FIM) and getattr(experiment.objective, 'rate', 0) < 1:
    whole = [before + middle.text + after for middle in middles]
    log_probs = likelihood.score_texts(module, params, vocabulary, whole, progress=False).tolist()
  found = [{'text': marked.rewritten(middle.text).decode('utf-8', 'surrogateescape'),
            'span': middle.text, 'log_prob': log_prob, 'span_log_prob': middle.log_prob,
            'is_whole': middle.is_whole, 'tokens': middle.tokens}
           for middle, log_prob in zip(middles, log_probs)]
  return sorted(found, key=lambda one: (-one['is_whole'], -one['log_prob']))


def _to_bytes(text: str) -> bytes:
  """What the shell gave us, were it UTF-8 or not."""
  return text.encode('utf-8', 'surrogateescape')
