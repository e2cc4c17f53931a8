"""What the server counts, for Prometheus."""
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest, Histogram
from prometheus_client.core import GaugeMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

# (name, labels, value)
State = Sequence[tuple[str, dict[str, str], float]]


class Metrics:
  """Counters of one server."""

  def __init__(self, state: Callable[[], State]):
    """state: gauges as they are now."""
    self.registry = CollectorRegistry()
    counter = lambda name, text, labels: Counter(name, text, labels, registry=self.registry)
    histogram = lambda name, text, labels, buckets: Histogram(
        name, text, labels, buckets=buckets, registry=self.registry)
    self.requests = counter('lm_requests', 'Requests by route and status', ['route', 'status'])
    self.tokens = counter('lm_tokens', 'Tokens read (prompt) and written (completion)',
                          ['model', 'kind'])
    self.refused = counter('lm_refused', 'Requests that were not taken', ['reason'])
    self.decisions = counter('lm_filter_decisions', 'Verdicts on requests (input) and texts '
                             '(output)', ['side', 'verdict', 'rule'])
    self.lost = counter('lm_worker_deaths', 'Workers that died', ['model'])
    self.seconds = histogram('lm_request_seconds', 'Seconds of a request', ['route'], SECONDS)
    self.first_token = histogram('lm_first_token_seconds', 'Seconds to the first token', ['model'],
                                 SECONDS)
    self.per_token = histogram('lm_token_seconds', 'Seconds a token behind the first', ['model'],
                               PER_TOKEN)
    self._state = state
    self.registry.register(self)

  def collect(self):
    """The gauges, as Prometheus' client asks for them."""
    families: dict[str, GaugeMetricFamily] = {}
    for name, labels, value in self._state():
      family = families.setdefault(name, GaugeMetricFamily(name, name, labels=list(labels)))
      family.add_metric(list(labels.values()), value)
    return families.values()

  def text(self) -> bytes:
    """The page."""
    return generate_latest(self.registry)
