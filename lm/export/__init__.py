"""A run in, a deployable artefact out: `lm export --run_dir=R --format=NAME --out=DIR`.

  programs.py     what a model of each family takes and gives, as a pure function of padded rows
  artifact.py     what a format is, and the table of them; a directory appears whole or never
  certificate.py  how near the artefact's answers are to the run's; its size and its speed
  FORMATS.md      which format takes which family, and why not (tests/export/formats_table.py)

  onnx_format.py    the graphs of a model, in the files and names that optimum reads
  onnx_lowering.py  a program of JAX as a graph of ONNX, where sizes are symbols
  onnx_graph.py     the graph that is being made
  onnx_quantize.py  the same in 8 bits

  onnx_rows.py, saved_model_rows.py  artefacts that write many texts at once; past.py: their keys
                                     and values between calls

  decoding.py          how a GPT or an encoder-decoder reads a prompt and writes on, as programs
  stablehlo.py         all programs by jax.export, for CPUs, GPUs and TPUs
  saved_model.py       all programs as signatures of TensorFlow's SavedModel, for its server
  saved_model_text.py  the signature of texts; text_graph.py: tokenizers within a graph
  warmup.py            requests by which a server compiles before it answers
  litert.py            LiteRT, in float32 and in 8 bits
  gguf.py              llama.cpp's file; gguf_tokenizer.py: the vocabulary in its metadata

Safetensors for `transformers` are written by `lm convert --run_dir=R --to=DIR`.

An artefact stands by itself: its model, the vocabulary of the run, and `certificate.json`.
"""
