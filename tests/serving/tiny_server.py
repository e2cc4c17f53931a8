"""The server of `lm serve`, over tiny workers."""
import logging
import pathlib
import sys

from lm.serving import server
from lm.serving.admission import Keys, Queue, Rates
from lm.serving.answers import Limits
from lm.serving.app import Service
from lm.serving.guard import Guard
from lm.serving.pool import Served

WORKER = str(pathlib.Path(__file__).with_name('tiny_worker.py'))

if __name__ == '__main__':
  keys, places, waiting, blocklist, *kinds = sys.argv[1:]
  logging.basicConfig(level=logging.INFO)
  models = [(Served(kind, [sys.executable, WORKER, kind]), Queue(int(places), int(waiting)))
            for kind in kinds]
  limits = Limits(body=4096, max_tokens=1000, max_texts=8, seconds=60.0)
  server.HEADER_SECONDS = 1.0
  guard = Guard(Served('filter', [sys.executable, WORKER, f'filter={blocklist}']),
                Queue(8, 8)) if blocklist else None
  service = Service(models, Keys(keys or None), Rates(None), limits, guard)
  server.serve(service, '127.0.0.1', port=0, drain_seconds=10.0)
