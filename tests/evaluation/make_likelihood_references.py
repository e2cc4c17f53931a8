"""Writes reference_likelihood.json: what lm-evaluation-harness says through transformers.

    python tests/evaluation/make_likelihood_references.py stories260k=DIR smollm2=DIR

Needs the extra `parity`, and directories that `lm convert --to` made of runs that `lm convert
--from` made of stories260K.bin (with tok512.bin as its tokenizer) and of
SmolLM2-135M-Instruct.Q4_1.gguf. The file holds, for some items of four tasks, (log-likelihood,
greedy) of each continuation, and the log-likelihoods of whole texts. The softmax is in float64: the
harness' own, in float32, is 1e-3 off where it is summed over a hundred tokens.
"""
import gzip
import json
import pathlib
import sys
import tarfile

DATA = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'eval'
FILE = pathlib.Path(__file__).with_name('reference_likelihood.json')
NUMBER = 6  # items of each task


def examples(number=NUMBER):
  """{task: the first of every so many examples}, as the tasks' local YAML files have them."""
  lines = lambda file: [json.loads(line) for line in file]
  labels = (DATA / 'piqa/valid-labels.lst').read_text().split()
  piqa = [{**row, 'label': int(label)} for row, label in
          zip(lines((DATA / 'piqa/valid.jsonl').open(encoding='utf-8')), labels)]
  found = {'piqa': piqa}
  for task, name in (('winogrande', 'winogrande'), ('lambada', 'lambada_openai')):
    with gzip.open(DATA / task / f'{name}.jsonl.gz', 'rt', encoding='utf-8') as file:
      found[task] = lines(file)
  with tarfile.open(DATA / 'blimp/blimp.tar.gz') as tar:
    found['blimp'] = [row for name in sorted(tar.getnames())
                      for row in lines(tar.extractfile(name))]
  return {task: rows[::len(rows) // number][:number] for task, rows in found.items()}


def requests(task, row):
  """The (context, continuation) pairs of an example, with the registry's prompts; of BLiMP without
  the space that it puts first, of which transformers makes other ids than sentencepiece."""
  if task == 'piqa':
    return [(f'Question: {row["goal"]}\nAnswer:', f' {row[key]}') for key in ('sol1', 'sol2')]
  if task == 'winogrande':
    return [(context, f' {row["continuation"]}') for context in row['context_options']]
  if task == 'lambada':
    return [(row['context'], f' {row["continuation"]}')]
  return [('', row[key]) for key in ('sentence_good', 'sentence_bad')]


def reference(directory):
  """{task: [(log-likelihood, greedy), ...], 'texts': [log-likelihood, ...]}."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM
  model = HFLM(pretrained=str(directory), dtype='float32', softmax_dtype='float64', device='cpu')
  ask = lambda kind, all_args: [Instance(kind, {}, args, i) for i, args in enumerate(all_args)]
  found = {}
  for task, rows in examples().items():
    pairs = [pair for row in rows for pair in requests(task, row)]
    found[task] = model.loglikelihood(ask('loglikelihood', pairs), disable_tqdm=True)
  texts = [row['context'] for row in examples()['lambada']]
  found['texts'] = model.loglikelihood_rolling(ask('loglikelihood_rolling', [
      (text,) for text in texts]), disable_tqdm=True)
  return found


if __name__ == '__main__':
  given = dict(argument.split('=') for argument in sys.argv[1:])
  FILE.write_text(json.dumps({name: reference(path) for name, path in given.items()}) + '\n')
