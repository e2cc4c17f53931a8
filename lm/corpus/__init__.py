"""Documents in, clean text out.

In: files, archives, dumps and data sets of raw documents. Out: shards of text, a passport for every
  document that was collected, and a card. Nothing is fetched, and nothing of what is read is run.

    sources -> blocks -> documents -> stages, cut at groupings into segments -> shards, passports

A `Stage` looks at one document, a `Grouping` at all of them together; any of them works alone:

    stage = quality_gopher.Gopher()
    stage.apply(document)                            # document.verdicts, document.removed_by

Change `readers/` to read another format, `collect.py` for what a source is, `extract.py` (with
`webpage.py`, `wikitext.py`, `markdown.py`, `decode.py`) for how text is made of it, and one file a
stage for what is done to it: `normalise`, `language`, `quality_*`, `classifier`, `harm`,
`privacy*`, `decontaminate`, `deduplicate/`. Add a stage by a file like them, and in `gin/corpus/`.
`pipeline.py` says what a corpus is, `steps.py` and `tasks.py` what is done in which order,
`workers.py` and `beam.py` who does it, `write.py`, `passports.py`, `summary.py` and `card*.py` what
is left in the end. `stdlib.py` is the corpus that every machine has.
"""
