"""A hand-written JAX training step of the same recipe, with no framework: what `lm` must not be
slower than.

Plain dicts, plain functions, layers unrolled, AdamW by hand. Where the CPU multiplies bfloat16 it
uses the one form of product that reaches the matrix unit (see pallas_kernels/matmul/cpu.py),
written out again here so that the comparison does not share the code that it judges.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from benchmark_workers import BATCH, D_FF, D_MODEL, HEADS, LAYERS, LENGTH, VOCAB

D_HEAD, CHUNK = D_MODEL // HEADS, 512


def row_major(x):
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def transposed(x):
  return row_major(jnp.swapaxes(x, -1, -2))


def dot(a, b, transpose_b=False):
  batch = tuple(range(a.ndim - 2))
  axis = b.ndim - 1 if transpose_b else b.ndim - 2
  return lax.dot_general(a, b, (((a.ndim - 1,), (axis,)), (batch, batch)),
                         preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x, w):
  return dot(x, w.astype(x.dtype)).astype(x.dtype)


def matmul_backward(saved, g):
  x, w = saved
  return dot(g, w.astype(g.dtype), True).astype(x.dtype), dot(transposed(x), g)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), matmul_backward)


@jax.custom_vjp
def attention(q, k, v):
  return attention_forward(q, k, v)[0]


def attention_forward(q, k, v):
  scores = dot(q, k, True) * D_HEAD**-0.5
  scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -1e30)
  probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return dot(probs, v).astype(q.dtype), (q, k, v, probs)


def attention_backward(saved, g):
  q, k, v, probs = saved
  p = probs.astype(jnp.float32)
  dp = dot(g, v, True)
  ds = (p * (dp - (dp * p).sum(-1, keepdims=True)) * D_HEAD**-0.5).astype(q.dtype)
  return (dot(ds, k).astype(q.dtype), dot(transposed(ds), q).astype(q.dtype),
          dot(transposed(probs), g).astype(q.dtype))


attention.defvjp(attention_forward, attention_backward)


@jax.custom_vjp
def head_loss(h, e, y):
  return head_loss_forward(h, e, y)[0]


def head_loss_forward(h, e, y):
  head = e.astype(h.dtype)

  def chunk(carry, inputs):
    loss, de = carry
    h, y = inputs
    logits = dot(h, head, True)
    largest = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - largest)
    total = exps.sum(-1, keepdims=True)
    target = jnp.take_along_axis(logits, y[:, None], 1)
    dlogits = (exps / total - (jnp.arange(VOCAB) == y[:, None])).astype(h.dtype)
    loss += (largest + jnp.log(total) - target).sum()
    return (loss, de + dot(transposed(dlogits), h)), dot(dlogits, head)

  chunks = h.reshape(-1, CHUNK, D_MODEL), y.reshape(-1, CHUNK)
  (loss, de), dh = lax.scan(chunk, (jnp.float32(0), jnp.zeros_like(e)), chunks)
  return loss / len(y), (dh.reshape(h.shape) / len(y), de / len(y))


def head_loss_backward(saved, g):
  return (saved[0] * g).astype(jnp.bfloat16), saved[1] * g, None


head_loss.defvjp(head_loss_forward, head_loss_backward)


def norm(x, scale):
  y = x.astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  return (y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * scale).astype(x.dtype)


def block(p, x):
  def heads(a):
    a = a.reshape(BATCH, LENGTH, HEADS, D_HEAD).transpose(0, 2, 1, 3)
    return row_major(a).reshape(BATCH * HEADS, LENGTH, D_HEAD)

  q, k, v = map(heads, jnp.split(matmul(norm(x, p['norm1']), p['qkv']), 3, 1))
  y = attention(q, k, v).reshape(BATCH, HEADS, LENGTH, D_HEAD).transpose(0, 2, 1, 3)
  x += matmul(row_major(y.reshape(-1, D_MODEL)), p['out'])
  return x + matmul(jax.nn.gelu(matmul(norm(x, p['norm2']), p['wi'])), p['wo'])


def loss_fn(p, x, y):
  h = (p['tokens'][x] + p['places']).astype(jnp.bfloat16).reshape(-1, D_MODEL)
  for layer in p['layers']:
    h = block(layer, h)
  return head_loss(norm(h, p['norm']), p['tokens'], y.reshape(-1))


def train_step(state, x, y):
  params, m, v, t = state
  loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
  t += 1
  m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
  v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
  update = lambda p, m, v: p - 1e-4 * (
      m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * p)
  return (jax.tree.map(update, params, m, v), m, v, t), loss


def make_step(dtype):
  """A function that does one step and returns its loss."""
  if dtype != 'bfloat16':
    raise SystemExit('the hand-written step is bfloat16; in float32 compare with '
                     'torch_eager:float32')
  keys = iter(jax.random.split(jax.random.key(0), 4 * LAYERS + 4))
  normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
  ones = jnp.ones(D_MODEL)
  layers = [{'norm1': ones, 'norm2': ones, 'qkv': normal(D_MODEL, 3 * D_MODEL),
             'out': normal(D_MODEL, D_MODEL), 'wi': normal(D_MODEL, D_FF),
             'wo': normal(D_FF, D_MODEL)} for _ in range(LAYERS)]
  params = {'tokens': normal(VOCAB, D_MODEL), 'places': normal(LENGTH, D_MODEL), 'norm': ones,
            'layers': layers}
  zeros = jax.tree.map(jnp.zeros_like, params)
  state = params, zeros, jax.tree.map(jnp.copy, zeros), jnp.float32(0)
  state = jax.tree.map(jnp.copy, state)  # donated buffers must not be shared
  x, y = jax.random.randint(next(keys), (2, BATCH, LENGTH), 0, VOCAB)
  step_fn = jax.jit(train_step, donate_argnums=0)

  def step():
    nonlocal state
    state, loss = step_fn(state, x, y)
    return float(loss)

  return step
