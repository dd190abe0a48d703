"""What the traced programs hold, whatever they are wrapped in.

Batched factorizations can hang on CPU, and a factorization outside of a loop
would run at every step: each is of one matrix, in a loop over those due.
"""

import re

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from tests.conformance import cases
from tests.conformance.cases import every_galore
from tests.marks import with_slow

_FACTORIzATIONS = {
  *("cholesky", "triangular_solve", "svd", "qr", "geqrf", "geqp3"),
  *("householder_product", "eigh", "eig", "lu", "schur", "hessenberg"),
  *("tridiagonal", "tridiagonal_solve"),
}
_LOOPS = {"while", "scan"}
_SHAPES = {"bias": (16,), "kernel": (8, 16), "stack": (3, 8, 16)}


def _twice(f):
  return jax.vmap(jax.vmap(f))


def _slope(update):
  def norm(g, state, params):
    return sum(jnp.sum(u**2) for u in update(g, state, params)[0].values())

  return jax.grad(norm)


_USES = {
  "plain": (lambda update: update, ()),
  "vmap": (jax.vmap, (2,)),
  "vmap of vmap": (_twice, (2, 3)),
  "vmap of grad": (lambda update: jax.vmap(_slope(update)), (2,)),
  "vmap of scan": (
    lambda update: jax.vmap(
      lambda g, s, p: jax.lax.scan(
        lambda s, _: (update(g, s, p)[1], None), s, length=3
      )
    ),
    (2,),
  ),
}


def _traced(name, use, **settings):
  """The function that is used and abstract arguments with its batch axes."""
  tx = cases.make(name, **settings)
  params = cases.normal(_SHAPES)
  state = tx.init(params)
  cases.assert_projects(name, state, ("kernel", "stack"))
  wrap, batch = _USES[use]
  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*batch, *x.shape), x.dtype),
    (params, state, params),
  )
  return jax.jit(wrap(tx.update)).trace(*given)


def _walk(jaxpr, loops=0):
  """Every operation, and the number of loops around it."""
  for eqn in jaxpr.eqns:
    yield eqn, loops
    inside = loops + (eqn.primitive.name in _LOOPS)
    for inner in _inner(list(eqn.params.values())):
      yield from _walk(inner, inside)


def _inner(value):
  """The jaxprs in a parameter of an operation."""
  if isinstance(value, jax.extend.core.ClosedJaxpr):
    return [value.jaxpr]
  if isinstance(value, jax.extend.core.Jaxpr):
    return [value]
  if isinstance(value, tuple | list):
    return [jaxpr for x in value for jaxpr in _inner(x)]
  return []


@every_galore
@pytest.mark.parametrize(
  "use", with_slow(_USES, "vmap of vmap", "vmap of grad")
)
def test_factorizations_are_of_one_matrix(name, use):
  trace = _traced(name, use)
  found = [
    eqn
    for eqn, _ in _walk(trace.jaxpr.jaxpr)
    if eqn.primitive.name in _FACTORIzATIONS
  ]
  assert found
  for eqn in found:
    assert [var.aval.ndim for var in eqn.invars] == [2] * len(eqn.invars)


@every_galore
@pytest.mark.parametrize("use", ["plain", "vmap"])
def test_lapack_calls_are_not_batched(name, use):
  """As above, in the program that is handed to the compiler."""
  text = _traced(name, use).lower().as_text()
  calls = re.findall(r"@lapack_\w+", text)
  batches = re.findall(r'num_batch_dims = "(\d+)"', text)
  assert calls
  assert set(batches) == {"0"}
  assert len(batches) == len(calls)


@every_galore
@pytest.mark.parametrize("use", ["plain", "vmap"])
def test_factorizations_are_in_loops_over_what_is_due(name, use):
  """So that also under `vmap`, where a branch is a selection, none is idle."""
  trace = _traced(name, use)
  depths = [
    loops
    for eqn, loops in _walk(trace.jaxpr.jaxpr)
    if eqn.primitive.name in _FACTORIzATIONS
  ]
  # Subspace iteration has loops of its own, over iterations and over passes,
  # and `vmap` adds one over its members.
  own = (0 if name == "faithful" else 2) + (use == "vmap")
  assert depths
  assert min(depths) > own
