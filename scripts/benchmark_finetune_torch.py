"""The recipe of benchmark_finetune.py in PyTorch and transformers: a process that it starts.

  python scripts/benchmark_finetune_torch.py DIRECTORY

DIRECTORY holds plan.json (recipe, learning rates, examples, which of them are in each step), the
model in `huggingface/` and the head's first values in head.npz. Lines on standard input: 'train N'
takes N steps, 'evaluate' writes predictions.json; each is answered by a line 'DONE seconds loss'.
"""
import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers


def main():
  """Answers until standard input ends."""
  directory = pathlib.Path(sys.argv[1])
  plan = json.loads((directory / 'plan.json').read_text())
  recipe = plan['recipe']
  torch.manual_seed(recipe['seed'])
  torch.set_num_threads(recipe['threads'])
  model = build(directory, plan)
  decayed = [p for p in model.parameters() if p.ndim > 1]
  free = [p for p in model.parameters() if p.ndim <= 1]
  optimizer = torch.optim.AdamW(
      [{'params': decayed, 'weight_decay': recipe['weight_decay']},
       {'params': free, 'weight_decay': 0.0}], lr=recipe['learning_rate'], betas=(0.9, 0.999))
  step = 0
  print('READY', flush=True)
  for line in sys.stdin:
    command, *arguments = line.split()
    start, loss = time.perf_counter(), 0.0
    if command == 'train':
      model.train()
      for _ in range(int(arguments[0])):
        loss = train_step(model, plan, plan['steps'][step])
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe['clip_norm'])
        for group in optimizer.param_groups:
          group['lr'] = plan['rates'][step]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    else:
      model.eval()
      predictions = evaluate(model, plan)
      (directory / 'predictions.json').write_text(json.dumps(predictions))
    print('DONE', time.perf_counter() - start, float(loss), flush=True)


def build(directory, plan):
  """The model with the head that the other side begins with."""
  kind, recipe, count = plan['kind'], plan['recipe'], plan['num_labels']
  options = {'hidden_dropout_prob': recipe['dropout'], 'attention_probs_dropout_prob':
             recipe['dropout'], 'num_labels': count}
  path = directory / 'huggingface'
  if kind == 'similarity':
    del options['num_labels']
    return transformers.AutoModel.from_pretrained(path, **options)
  auto = (transformers.AutoModelForTokenClassification if kind == 'tagging'
          else transformers.AutoModelForSequenceClassification)
  model, head = auto.from_pretrained(path, **options), np.load(directory / 'head.npz')
  with torch.no_grad():
    model.classifier.weight.copy_(torch.tensor(head['kernel'].T))
    model.classifier.bias.copy_(torch.tensor(head['bias']))
  return model


def collate(examples):
  """Examples padded to the longest of them, as DataCollatorWithPadding does it."""
  longest = max(len(example['ids']) for example in examples)
  ids, mask = torch.zeros((2, len(examples), longest), dtype=torch.long)
  for row, example in enumerate(examples):
    ids[row, :len(example['ids'])] = torch.tensor(example['ids'])
    mask[row, :len(example['ids'])] = 1
  return {'input_ids': ids, 'attention_mask': mask}


def tags(examples, longest):
  """Labels of tokens, -100 where there is none."""
  labels = torch.full((len(examples), longest), -100)
  for row, example in enumerate(examples):
    labels[row, :len(example['tags'])] = torch.tensor(example['tags'])
  return torch.where(labels < 0, -100, labels)


def embed(model, sides):
  """Means of the last hidden states, of unit length."""
  batch = collate([{'ids': ids} for ids in sides])
  hidden, mask = model(**batch).last_hidden_state, batch['attention_mask'][..., None]
  return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def cosines(model, examples):
  """Of the two texts of each example."""
  return (embed(model, [e['ids'] for e in examples]) * embed(model, [e['b'] for e in examples])
          ).sum(-1)


def train_step(model, plan, members):
  """Forwards and backwards."""
  examples = [plan['train'][i] for i in members]
  if plan['kind'] == 'similarity':
    values = torch.tensor([example['value'] for example in examples])
    loss = torch.nn.functional.mse_loss(cosines(model, examples), values)
  else:
    batch = collate(examples)
    labels = (tags(examples, batch['input_ids'].shape[1]) if plan['kind'] == 'tagging'
              else torch.tensor([example['label'] for example in examples]))
    loss = model(**batch, labels=labels).loss
  loss.backward()
  return loss.detach()


def evaluate(model, plan):
  """A label, the tags or the cosine of each test example."""
  found = [None] * len(plan['test'])
  order = sorted(range(len(found)), key=lambda i: len(plan['test'][i]['ids']))
  with torch.no_grad():
    for start in range(0, len(order), 32):
      members = order[start:start + 32]
      examples = [plan['test'][i] for i in members]
      if plan['kind'] == 'similarity':
        answers = cosines(model, examples).tolist()
      else:
        answers = model(**collate(examples)).logits.argmax(-1).tolist()
      for i, answer in zip(members, answers):
        found[i] = answer
  return found


if __name__ == '__main__':
  main()
