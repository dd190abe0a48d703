"""LoRA, QLoRA, ReLoRA and Low-Rank factorization.

They are reparametrizations, not optimizers: they change what is trained, and
any Optax optimizer trains the factors. GaLore instead changes the optimizer,
and trains the weights themselves.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from galore_optax import checks
from galore_optax.baselines import restart
from galore_optax.baselines.adapters import LowRank
from galore_optax.baselines.factors import STARTS
from galore_optax.tree import plan
from galore_optax.tree import rules as rules_lib


def _make(
  rank: Any,
  rules: rules_lib.Rules,
  full: Sequence[str],
  dtype: Any,
  **fields: Any,
) -> LowRank:
  checks.check_rank(checks.required("rank", rank))
  checks.check_float_dtype("dtype", dtype)
  checks.check_positive("alpha", fields.get("alpha"))
  checked = rules_lib.check_rules(rules)
  rules_lib.refuse_tensors(checked, "adapters are products of two matrices")
  for pattern, how in checked:
    for name in ("update_proj_gap", "scale", "proj_type"):
      if how is not None and getattr(how, name) is not None:
        raise ValueError(
          f"The rule {pattern!r} in `rules` sets `{name}`, which adapters "
          "do not use; they use `rank`, `rows` and `cols`."
        )
  full = full if isinstance(full, str) else tuple(full)
  if isinstance(full, str) or not all(isinstance(x, str) for x in full):
    raise TypeError(
      f'`full` must be regular expressions such as ("norm",), got {full!r}.'
    )
  default = rules_lib.Projection(rank=rank, proj_type="std")
  return LowRank(
    plan=plan.Plan(checked, default, always=True),
    full=full,
    dtype=None if dtype is None else jnp.dtype(dtype).name,
    **fields,
  )


def lora(
  rank: Any = 8,
  alpha: float = 16.0,
  *,
  rules: rules_lib.Rules = (),
  full: Sequence[str] = (),
  dtype: Any = None,
) -> LowRank:
  r"""LoRA: adds a product of two trained factors to each frozen weight.

  .. math::

    W = W_0 + \frac{\alpha}{r}\, a b, \qquad
    a \in \mathbb{R}^{m \times r},\ b \in \mathbb{R}^{r \times n}

  where a starts uniform in ±1/√m and b at zero, so that the weight is unchanged
  at first. Weights of any shape are read as stacks of matrices, as by
  :func:`galore_optax.galore`; each matrix of a stack has its own factors.

  Args:
    rank: Rank r (an int), or the fraction of the shorter side (a float).
    alpha: α; the change is multiplied by α / r.
    rules: `(regex, Projection or None)`, as for :func:`galore_optax.galore`:
      the first that is found in a leaf's path decides on its rank and axes,
      None leaves it without factors. By default a matrix gets factors if they
      are smaller than the matrix and it is no embedding, head, norm or bias.
    full: Regular expressions of leaves that are trained at full rank. All
      other leaves without factors are frozen; `("",)` trains all of them.
    dtype: Dtype of the factors; None for that of the weight.

  Returns:
    A :class:`galore_optax.baselines.LowRank`.

  Raises:
    ValueError: If a number is out of range or a rule sets what has no meaning.
    TypeError: If an argument is of a wrong type.

  Example:
    >>> import optax
    >>> import jax
    >>> params = {"attn": {"kernel": jnp.ones((64, 48)), "bias": jnp.ones(48)}}
    >>> method = lora(rank=4, alpha=8.0)
    >>> frozen, adapters = method.init(jax.random.key(0), params)
    >>> {path: (x.a.shape, x.b.shape) for path, x in adapters.items()}
    {'attn/kernel': ((64, 4), (4, 48))}
    >>> def loss(adapters):
    ...   return jnp.sum(method.apply(frozen, adapters)["attn"]["kernel"])
    >>> tx = optax.adamw(1e-3)
    >>> state = tx.init(adapters)
    >>> updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
    >>> adapters = optax.apply_updates(adapters, updates)
    >>> trained = method.merge(frozen, adapters)
    >>> bool(loss(adapters) < 64 * 48), trained["attn"]["kernel"].shape
    (True, (64, 48))

  References:
    Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, 2021, section 4.1.
  """
  return _make(rank, rules, full, dtype, alpha=alpha)


def qlora(
  rank: Any = 8,
  alpha: float = 16.0,
  *,
  rules: rules_lib.Rules = (),
  full: Sequence[str] = (),
  dtype: Any = None,
  double_quantization: bool = True,
) -> LowRank:
  """QLoRA: LoRA with frozen weights in four bits.

  Weights that have factors are quantized to the NormalFloat code, with a scale
  for every 64 elements. No other copy of them is kept. Leaves without factors
  are not quantized.

  Args:
    rank: See :func:`lora`.
    alpha: See :func:`lora`.
    rules: See :func:`lora`.
    full: See :func:`lora`.
    dtype: See :func:`lora`.
    double_quantization: Whether the scales are quantized to eight bits. A
      weight then takes 4.13 bits, and 4.5 bits otherwise.

  Returns:
    A :class:`galore_optax.baselines.LowRank`.

  Example:
    >>> import jax
    >>> from galore_optax import state_bytes
    >>> params = {"kernel": jnp.ones((1024, 1024))}
    >>> frozen, _ = qlora(rank=8).init(jax.random.key(0), params)
    >>> print(f"{8 * state_bytes(frozen) / 2**20:.2f} bits a weight")
    4.13 bits a weight

  References:
    Dettmers et al., `QLoRA: Efficient Finetuning of Quantized LLMs
    <https://arxiv.org/abs/2305.14314>`_, 2023, section 3.
  """
  frozen = "nf4_double" if double_quantization else "nf4"
  return _make(rank, rules, full, dtype, alpha=alpha, frozen=frozen)


def relora(
  rank: Any = 128,
  alpha: float = 32.0,
  *,
  rules: rules_lib.Rules = (),
  full: Sequence[str] = ("",),
  dtype: Any = None,
  pruning: str = "magnitude",
  pruned: float = 0.9,
) -> LowRank:
  """ReLoRA: LoRA that merges its factors and restarts every so many steps.

  The sum of several changes of rank r has a higher rank. Call
  :meth:`LowRank.restart` every T steps, train with
  :func:`galore_optax.baselines.jagged_schedule`, and, as in the paper, start
  from parameters that were trained at full rank for a while.

  Args:
    rank: See :func:`lora`.
    alpha: See :func:`lora`.
    rules: See :func:`lora`.
    full: See :func:`lora`; by default all leaves without factors are trained.
    dtype: See :func:`lora`.
    pruning: Which moments of the factors are set to zero at a restart: the
      smallest ones of each matrix (`magnitude`), or random ones (`random`).
    pruned: Share of moments that is set to zero: 1 resets all, 0 keeps all.

  Returns:
    A :class:`galore_optax.baselines.LowRank`.

  Raises:
    ValueError: If a number is out of range or `pruning` is unknown.
    TypeError: If an argument is of a wrong type.

  Example:
    >>> import jax
    >>> import optax
    >>> method, tx = relora(rank=4), optax.adam(1e-3)
    >>> params = {"kernel": jnp.ones((64, 48))}
    >>> frozen, adapters = method.init(jax.random.key(0), params)
    >>> state = tx.init(adapters)
    >>> restart = jax.jit(method.restart)
    >>> frozen, adapters, state = restart(
    ...   jax.random.key(1), frozen, adapters, state)

  References:
    Lialin et al., `ReLoRA: High-Rank Training Through Low-Rank Updates
    <https://arxiv.org/abs/2307.05695>`_, 2023.
  """
  checks.check_choice("pruning", pruning, restart.PRUNINGS)
  checks.check_number("pruned", pruned)
  if not 0 <= pruned <= 1:
    raise ValueError(f"`pruned` must lie in [0, 1], got {pruned!r}.")
  how = {"pruning": pruning, "pruned": float(pruned)}
  return _make(rank, rules, full, dtype, alpha=alpha, **how)


def low_rank(
  rank: Any = 128,
  *,
  rules: rules_lib.Rules = (),
  full: Sequence[str] = ("",),
  dtype: Any = None,
  start: str = "spectral",
) -> LowRank:
  r"""Low-Rank factorization: replaces each weight by a product, W = a b.

  Args:
    rank: See :func:`lora`.
    rules: See :func:`lora`.
    full: See :func:`lora`; by default all leaves without factors are trained.
    dtype: See :func:`lora`.
    start: `spectral`: factors of the best approximation of the weight that
      eight steps of subspace iteration find. `random`: normal factors, whose
      product has entries as large as the weight's. Of a weight of zeros one
      factor is zero.

  Returns:
    A :class:`galore_optax.baselines.LowRank`.

  Raises:
    ValueError: If a number is out of range or `start` is unknown.
    TypeError: If an argument is of a wrong type.

  Example:
    >>> import jax
    >>> params = {"kernel": jnp.outer(jnp.arange(1.0, 9.0), jnp.ones(16))}
    >>> method = low_rank(rank=1)
    >>> frozen, adapters = method.init(jax.random.key(0), params)
    >>> merged = method.merge(frozen, adapters)["kernel"]
    >>> bool(jnp.allclose(merged, params["kernel"], atol=1e-4))
    True

  References:
    Kamalakara et al., `Exploring Low Rank Training of Deep Neural Networks
    <https://arxiv.org/abs/2209.13569>`_, 2022, section 3.
  """
  checks.check_choice("start", start, STARTS)
  return _make(rank, rules, full, dtype, frozen="none", start=start)
