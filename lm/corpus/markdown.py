"""The text of Markdown: without the marks that only say how it looks and where links go.

Line structure, lists, tables and code stay as they are written.

Reference: https://spec.commonmark.org/0.31.2/, with front matter and tables as GitHub has them.
"""

from __future__ import annotations

import html
import re

_FRONT = re.compile(r'\A---[ \t]*\n(.{0,65536}?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)', re.DOTALL)
_TITLE = re.compile(r'^title:[ \t]*([^\n]*)$', re.MULTILINE)
_FENCED = re.compile(
    r'^ {0,3}(`{3,}+|~{3,}+)[^\n]*+\n(.*?)(?:^ {0,3}\1[`~]*+[ \t]*$|\Z)', re.MULTILINE | re.DOTALL
)
_HEADING = re.compile(r'^ {0,3}#{1,6}[ \t]++([^\n]*+)$', re.MULTILINE)
_CODE = re.compile(r'(?<!`)(`{1,3})(?!`)([^`\n]{1,1000})\1(?!`)')
_SAVED = re.compile('\ufdd0(\\d+)\ufdd1')
# In this order; each takes time in proportion to the text.
_RULES = tuple((re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in (
    (r'<!--(?:(?!-->)[\s\S])*+(?:-->|\Z)', ''),
    (r'^ {0,3}\[[^\]\n]{1,500}\]:[ \t]*\S[^\n]*+\n?', ''),  # Where a link goes.
    (r'^ {0,3}(?:=++|-[- ]*+|\*[* ]{2,}+|_[_ ]{2,}+)[ \t]*+$\n?', ''),  # Lines under or between.
    (r'^[ \t]*+\|?(?:[ \t]*+:?-++:?[ \t]*+\|)++[-: \t]*+$\n?', ''),  # Under the head of a table.
    (r'!\[[^\[\]\n]{0,500}\](?:\([^()\n]{0,1000}\)|\[[^\[\]\n]{0,500}\])?', ''),  # A picture.
    (r'\[\^[^\]\n]{1,100}\]', ''),  # A note's number.
    (r'\[([^\[\]\n]{0,1000})\](?:\([^()\n]{0,1000}(?:\([^()\n]{0,500}\)[^()\n]{0,500})?\)'
     r'|\[[^\[\]\n]{0,500}\])', r'\1'),  # A link.
    (r'<((?:https?|ftp|mailto):[^<>\s]{1,1000})>', r'\1'),
    (r'</?[a-zA-Z][^<>]{0,1000}>', ''),
    (r'^(?: {0,3}>[ \t]?)+', ''),
    (r'^([ \t]*+)[*+](?=[ \t])', r'\1-'),
    (r'(?<![*\w\\])(\*{1,3})(?=[^\s*])([^*\n]{1,1000})(?<=\S)\1(?!\*)', r'\2'),
    (r'(?<![_\w\\])(_{1,3})(?=[^\s_])([^_\n]{1,1000})(?<=\S)\1(?![_\w])', r'\2'),
    (r'~~([^~\n]{1,1000})~~', r'\1'),
    (r'\\([!-/:-@\[-`{-~])', r'\1'),
))  # fmt: skip


def text(source: str) -> tuple[str, str]:
  """Returns (text, title); the title is '' if neither the front matter nor a heading says it."""
  source, title = source.replace('\r\n', '\n'), ''
  front = _FRONT.match(source)
  if front:
    source = source[front.end() :]
    match = _TITLE.search(front[1])
    title = match[1].strip(' \t"\'') if match else ''
  parts, at = [], 0
  for fenced in _FENCED.finditer(source):
    parts += [_prose(source[at : fenced.start()]), fenced[2].rstrip('\n')]
    at = fenced.end()
  parts.append(_prose(source[at:]))
  heading = _HEADING.search(source)
  if not title and heading:
    title = _prose(heading[1].rstrip(' \t#'))
  return re.sub(r'\n{3,}', '\n\n', '\n'.join(parts)).strip('\n'), ' '.join(title.split())


def _prose(part: str) -> str:
  """Returns what stands outside of fences, less its marks."""
  saved: list[str] = []

  def save(match: re.Match[str]) -> str:
    saved.append(match[2])
    return f'\ufdd0{len(saved) - 1}\ufdd1'

  part = _CODE.sub(save, part.replace('\ufdd0', ''))
  part = _HEADING.sub(lambda match: match[1].rstrip(' \t#'), part)
  for pattern, replacement in _RULES:
    part = pattern.sub(replacement, part)
  return _SAVED.sub(lambda match: saved[int(match[1])], html.unescape(part))
