"""Block-wise quantized arrays: codes of 4 or 8 bits, and one scale a block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax import checks, flax_dicts
from galore_optax.quantization import dynamic_code, nf4, rounding
from galore_optax.quantization.blocks import BLOCK, Blocks, scale_shape

KINDS = ("int4", "int8", "dynamic", "unsigned_dynamic", "float8", "nf4")

_CODE_DTYPES = {
  "int4": jnp.int4,
  "int8": jnp.int8,
  "dynamic": jnp.int8,
  "unsigned_dynamic": jnp.uint8,
  "float8": jnp.float8_e4m3fn,
  "nf4": jnp.int4,
}


def rounds_at_random(kind: str) -> bool:
  """Whether a format has stochastic rounding."""
  return kind in rounding.BITS


@flax_dicts.serializable("codes", lambda q: q.kind)
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
  """A quantized array: codes, with one scale for every block of elements.

  Blocks lie along the longer one of the last two axes. In a basis, a block is
  part of a column; in a projected gradient, it is part of one direction, whose
  elements are of similar size. The scales have the axis of the blocks second to
  last and the other axis last, which accelerators lay out in lanes of 128
  without padding.

  Invariants, for an array (..., m, n) with b blocks along its longer side:

  * `codes` have the array's shape; `shape`, `ndim` and `size` are the array's.
  * `scale` has shape (..., b, n) if m >= n, else (..., b, m); for a vector
    (b,). All blocks have ceil(length / b) elements, but the last one may have
    fewer.
  * `zero` has the shape of `scale`, or is None where 0 has code 0.
  * 0 is represented exactly, whatever else is in the block.
  * As a pytree it has two or three arrays as leaves, to which functions of
    trees apply. Those that move or select entries are right, arithmetic is not.
    See :func:`galore_optax.quantize_params` for what raises.
  * In the state of an optimizer for parameters in boxes of Flax, `codes` are in
    such a box, see :mod:`galore_optax.tree.boxes`.
  * A slice along leading axes is a QArray of the slice, so that
    `jax.tree.map(lambda x: x[i], q)` takes one matrix of a stack.

  Attributes:
    codes: int4, int8, uint8 or float8 codes, in the shape of the array.
    scale: float32 factor of each block, or a :class:`QArray` of these factors.
    zero: int8 code of each block that means 0; None for symmetric formats.
    kind: The format, see :func:`quantize`.
  """

  codes: Any
  scale: Any
  zero: Any
  kind: str = dataclasses.field(metadata={"static": True})

  def __post_init__(self):
    """Raises if codes or scales come out of arithmetic, as far as one can see.

    JAX calls this for each result of `jax.tree.map`. Numbers of another dtype
    or without axes raise. What is no array is not checked, such as shapes and
    shardings, and neither are masks.
    """
    flax_dicts.register()  # Flax may have been imported since
    self._check_dtype("codes", _CODE_DTYPES.get(self.kind))
    self._check_dtype("scale", jnp.float32)

  def _check_dtype(self, name: str, wanted: Any) -> None:
    x = getattr(self, name)
    if wanted is None or not isinstance(x, jax.Array | np.ndarray):
      return
    if not jnp.issubdtype(x.dtype, jnp.number):
      return
    if x.dtype != wanted or not x.ndim:
      raise TypeError(
        f"The {name!r} of a QArray ({self.kind}) must be "
        f"{jnp.dtype(wanted).name} with at least one axis, got {x.dtype.name} "
        f"of shape {x.shape}. `jax.tree.map`, and so a norm or a mean over "
        "steps, applies a function to codes and scales, not to the array. "
        f"{_ADVICE}"
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that is represented."""
    return unboxed(self.codes).shape

  @property
  def ndim(self) -> int:
    """Number of axes of that array."""
    return unboxed(self.codes).ndim

  @property
  def size(self) -> int:
    """Number of elements of that array."""
    return unboxed(self.codes).size

  def reshape(self, *shape: Any) -> "QArray":
    """Reshapes the axes before the last two; blocks do not cross those."""
    shape = shape[0] if len(shape) == 1 and not _is_int(shape[0]) else shape
    lead = tuple(shape)[: len(shape) - 2]
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[-2:]), self)

  def __jax_array__(self) -> jax.Array:
    """Raises: JAX calls this if a QArray is used like an array."""
    return _refuse(self)

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Raises: NumPy would make an array of objects."""
    return _refuse(self, dtype, copy)


# What to do instead of computing with a QArray.
_ADVICE = (
  "Read it with `dequantize`, or parameters with `dequantize_params`, and "
  "compute with that."
)


def _refuse(q: QArray, *args: Any) -> Any:
  """An operator of QArray: raises."""
  del args
  raise TypeError(
    f"A QArray ({q.kind}, shape {q.shape}) is not an array to compute with. "
    f"{_ADVICE}"
  )


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow",
              "matmul"):  # fmt: skip
  setattr(QArray, f"__{_name}__", _refuse)
  setattr(QArray, f"__r{_name}__", _refuse)
for _name in ("neg", "pos", "abs", "lt", "le", "gt", "ge", "getitem"):
  setattr(QArray, f"__{_name}__", _refuse)


def unboxed(codes: Any) -> Any:
  """The array in the box of Flax that codes may be in."""
  leaves = jax.tree.leaves(codes)
  return leaves[0] if len(leaves) == 1 else codes


def is_quantized(x: Any) -> bool:
  """Whether a node is a :class:`QArray`."""
  return isinstance(x, QArray)


def quantize(
  x: jax.Array,
  kind: str = "int8",
  *,
  block: int = BLOCK,
  symmetric: bool = False,
  key: jax.Array | None = None,
) -> QArray:
  r"""Quantizes an array block by block.

  `int4`, `int8`: uniform steps. For a block with smallest element a and
  largest b, both extended to contain 0,

  .. math::

    s = \frac{b - a}{2^k - 1}, \quad z = \operatorname{round}(-a / s), \quad
    q = \operatorname{round}(x / s) + z

  or, `symmetric`, :math:`s = \max |x| / (2^{k-1} - 1)` and z = 0.

  `dynamic`, `unsigned_dynamic`: the 8-bit dynamic code of bitsandbytes, whose
  steps grow with the magnitude over seven decades, relative to the largest
  magnitude of the block. The unsigned one is for x >= 0.

  `float8`: float8_e4m3 relative to the largest magnitude of the block.

  `nf4`: sixteen quantiles of a normal distribution, relative to the largest
  magnitude of the block. QLoRA uses it for frozen weights, in blocks of 64.

  Args:
    x: Array of finite floats with at least one axis. Magnitudes above 8e37 may
      be quantized as 8e37 or as 0.
    kind: The format.
    block: Elements that share a scale, at most.
    symmetric: Whether the steps of `int4` and `int8` are the same on both
      sides of 0.
    key: Random key: `int4` and `int8` round up or down at random such that
      the expectation is x (one level is left unused for that). None rounds to
      the nearest.

  Returns:
    The quantized array.

  Raises:
    ValueError: If `kind` is unknown, `block` is not positive, `x` has no axes,
      or the format has no stochastic rounding.

  Example:
    >>> q = quantize(jnp.linspace(5.0, 6.0, 512).reshape(256, 2), "int4")
    >>> bool(jnp.max(jnp.abs(dequantize(q) - 5.5)) < 0.71)
    True

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022; Zhang et al., `Q-GaLore
    <https://arxiv.org/abs/2407.08296>`_, 2024, section 3; Dettmers et al.,
    `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, section 3.
  """
  checks.check_choice("kind", kind, KINDS)
  checks.check_positive("block", block)
  if jnp.ndim(x) == 0:
    raise ValueError("`x` has no axes; only arrays have blocks.")
  if key is not None and not rounds_at_random(kind):
    raise ValueError(
      f"`key` asks for stochastic rounding, which {kind!r} does not have; only "
      "int4 and int8 do."
    )
  blocks = Blocks(x.shape, scale_shape(x.shape, block))
  parts = blocks.split(x.astype(jnp.float32))
  if kind in rounding.BITS and not symmetric:
    codes, scale, zero = rounding.asymmetric(
      blocks, parts, rounding.BITS[kind], key
    )
  else:
    codes, scale = rounding.symmetric(blocks, parts, kind, key)
    zero = None
  codes = blocks.merge(codes).astype(_CODE_DTYPES[kind])
  return QArray(codes, scale, zero, kind)


def dequantize(q: QArray, dtype: Any = jnp.float32) -> jax.Array:
  """The array that a quantized one stands for.

  Args:
    q: The quantized array.
    dtype: Dtype of the result; the arithmetic is float32.

  Returns:
    Array of shape `q.shape`.

  Example:
    >>> x = jnp.arange(-4.0, 4.0).reshape(2, 4)
    >>> bool(jnp.allclose(dequantize(quantize(x, "int8")), x, atol=0.03))
    True
  """
  blocks = Blocks(q.shape, q.scale.shape)
  codes = blocks.split(unboxed(q.codes))
  if q.kind == "dynamic":
    values = dynamic_code.signed_value(codes.astype(jnp.int32))
  elif q.kind == "unsigned_dynamic":
    values = dynamic_code.unsigned_value(codes.astype(jnp.int32))
  elif q.kind == "nf4":
    values = nf4.value(codes)
  else:
    values = codes.astype(jnp.float32)
  if q.zero is not None:
    values -= blocks.expand(q.zero).astype(jnp.float32)
  return blocks.merge(values * blocks.expand(_scale(q))).astype(dtype)


def _scale(q: QArray) -> jax.Array:
  """The scales as an array."""
  return dequantize(q.scale) if is_quantized(q.scale) else q.scale


def requantize_on_grid(
  q: QArray, x: jax.Array, key: jax.Array | None = None
) -> QArray:
  """Quantizes new values of a quantized array, on its old levels if they fit.

  With new levels every number of a block would be rounded again, also those
  that hardly changed; rounded at random, they would drift. So `int4` and `int8`
  blocks keep their scale and zero as long as all elements are in range and at
  least half of the range is used. New levels leave room to grow, an eighth.

  Args:
    q: The array before.
    x: Its new values, an array of the same shape.
    key: See :func:`quantize`.

  Returns:
    `x`, quantized in the format of `q`.
  """
  if q.kind not in rounding.BITS or q.zero is None:
    return requantize(q, x, key)
  blocks = Blocks(q.shape, q.scale.shape)
  parts = blocks.split(x.astype(jnp.float32))
  low = jnp.minimum(blocks.reduce(jnp.min, parts), 0)
  high = jnp.maximum(blocks.reduce(jnp.max, parts), 0)
  half = 2 ** (rounding.BITS[q.kind] - 1)
  zero = q.zero.astype(jnp.float32)
  bottom, top = q.scale * (-half - zero), q.scale * (half - 1 - zero)
  fits = (low >= bottom) & (high <= top) & (2 * (high - low) >= top - bottom)
  # One level is left unused, as in `rounding.asymmetric`.
  fresh = 1.125 * (high / (2 * half - 2) - low / (2 * half - 2))
  scale = jnp.where(fits, q.scale, fresh)
  divisor = rounding.safe_divisor(scale)
  zero = jnp.where(fits, zero + half, jnp.ceil(-1.125 * low / divisor - 1e-4))
  codes = parts / blocks.expand(divisor)
  codes = rounding.round_to_integers(codes, key) + blocks.expand(zero)
  codes = blocks.merge(jnp.clip(codes, 0, 2 * half - 1) - half)
  return dataclasses.replace(
    q,
    codes=codes.astype(q.codes.dtype),
    scale=scale,
    zero=(zero - half).astype(q.zero.dtype),
  )


def elementwise_scale(q: QArray) -> jax.Array:
  """The scale of every element.

  Args:
    q: The quantized array.

  Returns:
    float32 of shape `q.shape`.
  """
  return Blocks(q.shape, q.scale.shape).expand_to_array(_scale(q))


def any_in_block(q: QArray, mask: jax.Array) -> jax.Array:
  """Whether a mask is true anywhere in each block.

  Args:
    q: The quantized array whose blocks are meant.
    mask: bool, of shape `q.shape`.

  Returns:
    bool, in the shape of the scales.
  """
  blocks = Blocks(q.shape, q.scale.shape)
  return blocks.reduce(jnp.any, blocks.split(mask))


def where_blocks(mask: jax.Array, x: QArray, y: QArray) -> QArray:
  """Blocks of `x` where the mask is true, of `y` elsewhere.

  Args:
    mask: bool, in the shape of the scales.
    x: A quantized array.
    y: Another one of the same shape and format.

  Returns:
    The quantized array.
  """
  of_elements = Blocks(x.shape, x.scale.shape).expand_to_array(mask)
  return dataclasses.replace(
    x,
    codes=jnp.where(of_elements, x.codes, y.codes),
    scale=jnp.where(mask, x.scale, y.scale),
    zero=None if x.zero is None else jnp.where(mask, x.zero, y.zero),
  )


def zeros(
  shape: tuple[int, ...],
  kind: str,
  *,
  block: int = BLOCK,
  symmetric: bool = False,
) -> QArray:
  """A quantized array of zeros.

  Args:
    shape: Shape of the array.
    kind: The format, see :func:`quantize`.
    block: Elements that share a scale, at most.
    symmetric: See :func:`quantize`.

  Returns:
    The quantized array.
  """
  small = scale_shape(shape, block)
  zero = None
  if kind in rounding.BITS and not symmetric:
    zero = jnp.zeros(small, jnp.int8)
  codes = jnp.zeros(shape, _CODE_DTYPES[kind])
  scale = jnp.zeros(small, jnp.float32)
  return QArray(codes, scale, zero, kind)


def requantize(q: QArray, x: jax.Array, key: jax.Array | None = None) -> QArray:
  """Quantizes an array in the format of another one.

  Args:
    q: A quantized array, whose kind, blocks and symmetry are used.
    x: Array of the same shape.
    key: See :func:`quantize`.

  Returns:
    `x`, quantized.
  """
  block = Blocks(q.shape, q.scale.shape).length
  return quantize(x, q.kind, block=block, symmetric=q.zero is None, key=key)


def _is_int(x: Any) -> bool:
  return isinstance(x, int)
