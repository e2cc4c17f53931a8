"""Writes reference_chat.json: conversations as `transformers` tokenises them.

    python tests/data/make_chat_references.py PUBLISHED.json [SmolLM2.gguf]

PUBLISHED.json maps the names of `chat_tokenizers.FAMILIES` to the `chat_template` of models that
are published with them: OpenHermes 2.5 (chatml), Meta-Llama-3-8B-Instruct, Llama-2-7b-chat-hf,
Mistral-7B-Instruct-v0.1, gemma-2b-it. Needs the extra `parity`.
"""
import json
import pathlib
import sys
import tempfile

import chat_tokenizers

from lm.data.pretrained_vocabularies import open_pretrained


def record(tokenizer, messages):
  """What `apply_chat_template` gives of a conversation, and of it up to the last answer."""
  ids = lambda messages, **options: list(
      tokenizer.apply_chat_template(messages, tokenize=True, **options)['input_ids'])
  return {'messages': messages, 'ids': ids(messages),
          'prompt': ids(messages[:-1], add_generation_prompt=True)}


def main(published, gguf=None):
  from transformers import AutoTokenizer

  templates, found = json.loads(pathlib.Path(published).read_text()), {}
  with tempfile.TemporaryDirectory() as folder:
    directories = {name: chat_tokenizers.save(name, pathlib.Path(folder, name), template)
                   for name, template in templates.items()}
    if gguf:
      directories['smollm2'] = pathlib.Path(folder, 'smollm2')
      open_pretrained(gguf).save_pretrained(directories['smollm2'])
    for name, directory in directories.items():
      tokenizer = AutoTokenizer.from_pretrained(directory)
      found[name] = [record(tokenizer, messages)
                     for messages in chat_tokenizers.conversations(name)]
  path = pathlib.Path(__file__).parent / 'reference_chat.json'
  path.write_text(json.dumps(found, ensure_ascii=False, separators=(',', ':')) + '\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
