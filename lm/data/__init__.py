"""Text in, batches out.

In: the documents of `lm.corpus`. Out: numpy batches under SeqIO's feature names, each a pure
function of (seed, step).

    TextTask.prepare()  documents -> vocabulary -> SeqIO task -> ArrayRecord cache  (once, offline)
    ExampleTask.prepare()  labelled examples -> tokens -> cache                     (once)
    Loader.iterate()    cache -> packed sequences -> objective -> batches           (every step)

Change `splits.py` for what is held out, `vocabularies.py` and `vocabulary_training.py` for text <->
ids (`tokenizer_training.py` for byte-level BPE and WordPiece, `pretrained_vocabularies.py` and the
other `tokenizer_*.py` for those of other projects), `vocabulary_measures.py` for how they compare,
`seqio_tasks.py` for what happens to a document before it is cached (the only file here that imports
TensorFlow), `cache.py`, `shards.py` and `build.py` for how the cache lies on disk and is built,
`packing.py` for how documents fill sequences, `objectives/` for what the model is asked to predict,
`loader.py` for batching and prefetch, `mixtures.py` for several tasks at once, `examples/` for
labelled examples.
"""
