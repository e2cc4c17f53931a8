"""Runs in, answers over HTTP out: `lm serve`.

One process speaks HTTP, and each model has a worker, a process of its own that computes; between
them go lines of JSON. So a model that dies takes nothing with it but the answers it was writing.

  protocol.py   what goes between server and worker: jobs one way, events the other
  worker.py     the loop of a worker over a backend
  writer.py     a backend that writes texts, over the paged engine (GPT) or one of rows (T5,
                Transformer-XL, artefacts of ONNX and SavedModel); what else is asked of it is done
                in pieces between the engine's steps
  reader.py     a backend of encoders (vectors, classes, tags, blanks), of runs and of artefacts:
                batches within a latency
  pool.py       the server's side of workers: started, replaced, changed for a newer checkpoint
  admission.py  who comes in: keys, rates, a bounded queue with fair shares
  schemas.py    what requests may say, in the forms of OpenAI's API
  filters.py    a backend that judges texts: a list of words, a classifier of harm, what is private
  guard.py      what the server does with its verdicts, on requests and on answers
  sentences.py  by which pieces a text that is being written is judged and goes out
  answers.py    from requests to jobs, and from events to answers
  clouds.py     the contracts of SageMaker and Vertex AI
  app.py        the routes, errors and metrics of the server; page.html is its web page
  server.py     the process: sockets, signals, limits of connections
"""
