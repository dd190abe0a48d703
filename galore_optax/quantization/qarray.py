"""Block-wise quantised arrays: codes of 4 or 8 bits and a scale a block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import checks
from galore_optax.quantization import dynamic_code, nf4

KINDS = ("int4", "int8", "dynamic", "unsigned_dynamic", "float8", "nf4")

# Elements that share a scale, as in bitsandbytes and Q-GaLore.
BLOCK = 256

_CODE_DTYPES = {
  "int4": jnp.int4,
  "int8": jnp.int8,
  "dynamic": jnp.int8,
  "unsigned_dynamic": jnp.uint8,
  "float8": jnp.float8_e4m3fn,
  "nf4": jnp.int4,
}
_BITS = {"int4": 4, "int8": 8}


def rounds_at_random(kind: str) -> bool:
  """Whether a kind has stochastic rounding."""
  return kind in _BITS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
  """An array as codes with one scale for every block of elements.

  Blocks lie along the longer one of the last two axes: of a basis within its
  columns, of a projected gradient within one direction, whose elements are of
  similar size. The scales have the blocks' axis second to last and the other
  axis last, which accelerators then lay out in lanes of 128 without padding.

  Invariants, for an array (..., m, n) with b blocks along its longer side:

  * `codes` have the array's shape; `shape`, `ndim` and `size` are its own.
  * `scale` has shape (..., b, n) if m >= n, else (..., b, m); for a vector
    (b,). All blocks have ceil(length / b) elements, but the last one may have
    fewer.
  * `zero` has the shape of `scale`, or is None where 0 has code 0.
  * 0 is represented exactly, whatever the block holds.
  * A slice along leading axes is a QArray of the slice, so stacks can be
    walked with `jax.tree.map(lambda x: x[i], q)`.

  Attributes:
    codes: int4, int8, uint8 or float8 codes, in the shape of the array.
    scale: float32 factor of each block; or these factors, quantised in turn,
      see :func:`quantize_scale`.
    zero: int8 code that means 0, a block; None for symmetric formats.
    kind: The format, see :func:`quantize`.
  """

  codes: Any
  scale: Any
  zero: Any
  kind: str = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that is represented."""
    return self.codes.shape

  @property
  def ndim(self) -> int:
    """Number of its axes."""
    return self.codes.ndim

  @property
  def size(self) -> int:
    """Number of its elements."""
    return self.codes.size

  def reshape(self, *shape: Any) -> "QArray":
    """Reshapes the axes before the last two, which blocks do not cross."""
    shape = shape[0] if len(shape) == 1 and not _is_int(shape[0]) else shape
    lead = tuple(shape)[: len(shape) - 2]
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[-2:]), self)

  def __jax_array__(self) -> jax.Array:
    """Refuses to be taken for an array; JAX asks for one in arithmetic."""
    raise TypeError(
      f"A QArray ({self.kind}, shape {self.shape}) is no array to compute "
      "with. Read it with `dequantize`, or parameters with `dequantize_params`."
    )


def is_quantized(x: Any) -> bool:
  """Whether a node is a :class:`QArray`."""
  return isinstance(x, QArray)


def block_axis(shape: tuple[int, ...]) -> int:
  """The axis along which an array's blocks lie: the longer of the last two.

  Args:
    shape: Shape of the array.

  Returns:
    -1 or -2.

  Example:
    >>> block_axis((32, 4096, 1024)), block_axis((1024, 4096)), block_axis((9,))
    (-2, -1, -1)
  """
  return -2 if len(shape) > 1 and shape[-2] >= shape[-1] else -1


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
  """Shape of the scales of an array.

  Args:
    shape: Shape of the array.
    block: Elements of a block, at most.

  Returns:
    The shape, with the number of blocks second to last.

  Example:
    >>> scale_shape((1024, 11008)), scale_shape((11008, 1024))
    ((43, 1024), (43, 1024))
  """
  axis = block_axis(shape)
  count = -(-shape[axis] // block)
  other = shape[-2] if axis == -1 and len(shape) > 1 else shape[-1]
  return (*shape[:-2], count, other) if len(shape) > 1 else (count,)


def scale_spec(spec: tuple, shape: tuple[int, ...]) -> tuple:
  """Partition of the scales that follows from the array's.

  Args:
    spec: One entry an axis of the array.
    shape: Shape of the array.

  Returns:
    One entry an axis of the scales.
  """
  spec = (*spec, *(None,) * (len(shape) - len(spec)))
  if len(shape) < 2 or block_axis(shape) == -2:
    return spec
  return (*spec[:-2], spec[-1], spec[-2])


def quantize(
  x: jax.Array,
  kind: str = "int8",
  *,
  block: int = BLOCK,
  symmetric: bool = False,
  key: jax.Array | None = None,
) -> QArray:
  r"""Quantises an array block by block.

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
  magnitude of the block; QLoRA's for frozen weights, in blocks of 64.

  Args:
    x: Array of floats with at least one axis, finite; magnitudes above 8e37
      may count as that or as 0.
    kind: The format.
    block: Elements that share a scale, at most.
    symmetric: Whether the steps of `int4` and `int8` are the same on both
      sides of 0.
    key: Random key: `int4` and `int8` round up or down at random such that
      the expectation is x (one of the levels is given up for that). None
      rounds to the nearest.

  Returns:
    The quantised array.

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
      f"`key` asks for stochastic rounding, which {kind!r} does not have; it "
      "is for int4 and int8."
    )
  blocks = _Blocks(x.shape, scale_shape(x.shape, block))
  parts = blocks.split(x.astype(jnp.float32))
  if kind in _BITS and not symmetric:
    codes, scale, zero = _asymmetric(blocks, parts, _BITS[kind], key)
  else:
    codes, scale = _symmetric(blocks, parts, kind, key)
    zero = None
  codes = blocks.merge(codes).astype(_CODE_DTYPES[kind])
  return QArray(codes, scale, zero, kind)


def dequantize(q: QArray, dtype: Any = jnp.float32) -> jax.Array:
  """The array that a quantised one stands for.

  Args:
    q: The quantised array.
    dtype: Dtype of the result; the arithmetic is float32.

  Returns:
    Array of shape `q.shape`.

  Example:
    >>> x = jnp.arange(-4.0, 4.0).reshape(2, 4)
    >>> bool(jnp.allclose(dequantize(quantize(x, "int8")), x, atol=0.03))
    True
  """
  blocks = _Blocks(q.shape, q.scale.shape)
  codes = blocks.split(q.codes)
  if q.kind == "dynamic":
    values = dynamic_code.signed_value(codes.astype(jnp.int32))
  elif q.kind == "unsigned_dynamic":
    values = dynamic_code.unsigned_value(codes.astype(jnp.int32))
  elif q.kind == "nf4":
    values = nf4.value(codes)
  else:
    values = codes.astype(jnp.float32)
  if q.zero is not None:
    values -= blocks.spread(q.zero).astype(jnp.float32)
  return blocks.merge(values * blocks.spread(_scale(q))).astype(dtype)


def quantize_scale(q: QArray, block: int = BLOCK) -> QArray:
  """Quantises the scales of an array in their turn, to the 8-bit dynamic code.

  Of 64 elements that share a scale each pays 0.127 bits for it then, and not
  0.5: QLoRA's double quantisation. The paper subtracts the scales' mean from
  them and takes a signed code; the unsigned one needs no mean.

  Args:
    q: The quantised array.
    block: Scales that share a scale of theirs, at most.

  Returns:
    The same codes, with a :class:`QArray` for their scales. It can be read and
    sliced; it is not meant to be updated.

  Example:
    >>> q = quantize(jnp.linspace(-1.0, 1.0, 512), "nf4", block=64)
    >>> x, y = dequantize(q), dequantize(quantize_scale(q))
    >>> bool(jnp.max(jnp.abs(x - y)) < 0.004)
    True
  """
  scale = quantize(q.scale, "unsigned_dynamic", block=block)
  return dataclasses.replace(q, scale=scale)


def _scale(q: QArray) -> jax.Array:
  """The scales as an array."""
  return dequantize(q.scale) if is_quantized(q.scale) else q.scale


def quantize_near(
  q: QArray, x: jax.Array, key: jax.Array | None = None
) -> QArray:
  """Quantises what a quantised array has become, on its own steps if they fit.

  With new steps every number of a block would be rounded anew, also those that
  hardly changed; at random, they would wander. So `int4` and `int8` blocks keep
  their scale and zero as long as they hold the block, and at least half of
  their range is used. New ones leave room to grow, an eighth.

  Args:
    q: The array as it was.
    x: As it is now, of the same shape.
    key: See :func:`quantize`.

  Returns:
    `x`, quantised in the format of `q`.
  """
  if q.kind not in _BITS or q.zero is None:
    return requantize(q, x, key)
  blocks = _Blocks(q.shape, q.scale.shape)
  parts = blocks.split(x.astype(jnp.float32))
  low = jnp.minimum(blocks.reduce(jnp.min, parts), 0)
  high = jnp.maximum(blocks.reduce(jnp.max, parts), 0)
  half = 2 ** (_BITS[q.kind] - 1)
  zero = q.zero.astype(jnp.float32)
  bottom, top = q.scale * (-half - zero), q.scale * (half - 1 - zero)
  fits = (low >= bottom) & (high <= top) & (2 * (high - low) >= top - bottom)
  # One level less than there are, as in _asymmetric.
  fresh = 1.125 * (high / (2 * half - 2) - low / (2 * half - 2))
  scale = jnp.where(fits, q.scale, fresh)
  divisor = _divisor(scale)
  zero = jnp.where(fits, zero + half, jnp.ceil(-1.125 * low / divisor - 1e-4))
  codes = parts / blocks.spread(divisor)
  codes = _round(codes, key) + blocks.spread(zero)
  codes = blocks.merge(jnp.clip(codes, 0, 2 * half - 1) - half)
  return dataclasses.replace(
    q,
    codes=codes.astype(q.codes.dtype),
    scale=scale,
    zero=(zero - half).astype(q.zero.dtype),
  )


def spread_scale(q: QArray) -> jax.Array:
  """The scale of every element.

  Args:
    q: The quantised array.

  Returns:
    float32 of shape `q.shape`.
  """
  blocks = _Blocks(q.shape, q.scale.shape)
  like = jax.eval_shape(blocks.split, q.codes)
  return blocks.merge(jnp.broadcast_to(blocks.spread(_scale(q)), like.shape))


def any_in_block(q: QArray, hit: jax.Array) -> jax.Array:
  """Whether anything in a block is hit.

  Args:
    q: Gives the blocks.
    hit: Array of bool of shape `q.shape`.

  Returns:
    bool, in the shape of the scales.
  """
  blocks = _Blocks(q.shape, q.scale.shape)
  return blocks.reduce(jnp.any, blocks.split(hit))


def where_blocks(hit: jax.Array, x: QArray, y: QArray) -> QArray:
  """Blocks of `x` where hit, of `y` elsewhere.

  Args:
    hit: bool, in the shape of the scales.
    x: A quantised array.
    y: Another one of the same shape and format.

  Returns:
    The quantised array.
  """
  blocks = _Blocks(x.shape, x.scale.shape)
  like = jax.eval_shape(blocks.split, x.codes)
  spread = jnp.broadcast_to(blocks.spread(hit), like.shape)
  return dataclasses.replace(
    x,
    codes=jnp.where(blocks.merge(spread), x.codes, y.codes),
    scale=jnp.where(hit, x.scale, y.scale),
    zero=None if x.zero is None else jnp.where(hit, x.zero, y.zero),
  )


def zeros(
  shape: tuple[int, ...],
  kind: str,
  *,
  block: int = BLOCK,
  symmetric: bool = False,
) -> QArray:
  """Zeros, quantised.

  Args:
    shape: Shape of the array.
    kind: The format, see :func:`quantize`.
    block: Elements that share a scale, at most.
    symmetric: See :func:`quantize`.

  Returns:
    The quantised array, in which every block is zero.
  """
  small = scale_shape(shape, block)
  zero = None
  if kind in _BITS and not symmetric:
    zero = jnp.zeros(small, jnp.int8)
  codes = jnp.zeros(shape, _CODE_DTYPES[kind])
  scale = jnp.zeros(small, jnp.float32)
  return QArray(codes, scale, zero, kind)


def requantize(q: QArray, x: jax.Array, key: jax.Array | None = None) -> QArray:
  """Quantises an array in the format of another one.

  Args:
    q: Gives kind, blocks and symmetry.
    x: Array of the same shape.
    key: See :func:`quantize`.

  Returns:
    `x`, quantised.
  """
  block = _Blocks(q.shape, q.scale.shape).length
  return quantize(x, q.kind, block=block, symmetric=q.zero is None, key=key)


def _is_int(x: Any) -> bool:
  return isinstance(x, int)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """How an array is cut in blocks: (..., n, ...) to (..., b, n / b, ...)."""

  shape: tuple[int, ...]
  scales: tuple[int, ...]

  @property
  def axis(self) -> int:
    """Axis of the array that is cut; elements of a block lie along it."""
    return block_axis(self.shape)

  @property
  def count(self) -> int:
    """Number of blocks b."""
    return self.scales[-2] if len(self.shape) > 1 else self.scales[-1]

  @property
  def length(self) -> int:
    """Elements of a block."""
    return max(1, -(-self.shape[self.axis] // max(self.count, 1)))

  @property
  def _at(self) -> int:
    return len(self.shape) + self.axis

  def split(self, x: jax.Array) -> jax.Array:
    """The array in blocks, filled up with zeros."""
    missing = self.count * self.length - self.shape[self.axis]
    if missing:
      padding = [(0, 0)] * x.ndim
      padding[self.axis] = (0, missing)
      x = jnp.pad(x, padding)
    before, after = self.shape[: self._at], self.shape[self._at + 1 :]
    return x.reshape(*before, self.count, self.length, *after)

  def merge(self, x: jax.Array) -> jax.Array:
    """Undoes :meth:`split`."""
    before, after = self.shape[: self._at], self.shape[self._at + 1 :]
    x = x.reshape(*before, self.count * self.length, *after)
    if x.shape == self.shape:
      return x
    return jax.lax.slice_in_dim(x, 0, self.shape[self.axis], axis=self._at)

  def reduce(self, f: Any, x: jax.Array) -> jax.Array:
    """One value a block, by a function of an array and an axis."""
    return self._turn(f(x, self.axis))

  def spread(self, scale: jax.Array) -> jax.Array:
    """Makes a value a block fit for arithmetic with what `split` gave."""
    return jnp.expand_dims(self._turn(scale), self.axis)

  def _turn(self, x: jax.Array) -> jax.Array:
    turned = self.axis == -1 and len(self.shape) > 1
    return jnp.swapaxes(x, -1, -2) if turned else x


def _asymmetric(
  blocks: _Blocks, x: jax.Array, bits: int, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes, scale and zero of uniform steps between the extremes."""
  low = jnp.minimum(blocks.reduce(jnp.min, x), 0)
  high = jnp.maximum(blocks.reduce(jnp.max, x), 0)
  # One level less where codes are random: then none has to be clipped, which
  # would bias the ends, although the zero is a whole number of steps.
  steps = 2**bits - (1 if key is None else 2)
  scale = high / steps - low / steps  # the difference may be out of range
  divisor = _divisor(scale)
  zero = -low / divisor
  zero = jnp.round(zero) if key is None else jnp.ceil(zero - 1e-4)
  codes = _round(x / blocks.spread(divisor), key) + blocks.spread(zero)
  offset = 2 ** (bits - 1)  # the codes are signed
  codes = jnp.clip(codes, 0, 2**bits - 1) - offset
  return codes, scale, (zero - offset).astype(jnp.int8)


def _symmetric(
  blocks: _Blocks, x: jax.Array, kind: str, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Codes and scale relative to the largest magnitude."""
  largest = blocks.reduce(jnp.max, jnp.abs(x))
  top = {"int4": 7.0, "int8": 127.0, "float8": 448.0}.get(kind, 1.0)
  scale = largest / top
  x = jnp.clip(x / blocks.spread(_divisor(scale)), -top, top)
  if kind == "dynamic":
    return dynamic_code.signed_code(x), scale
  if kind == "unsigned_dynamic":
    return dynamic_code.unsigned_code(x), scale
  if kind == "nf4":
    return nf4.code(x), scale
  return (x if kind == "float8" else _round(x, key)), scale


def _divisor(scale: jax.Array) -> jax.Array:
  """What a block is divided by; its reciprocal, which XLA takes, is finite."""
  return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1)


def _round(x: jax.Array, key: jax.Array | None) -> jax.Array:
  """To the nearest whole number, or up or down with unbiased chances."""
  if key is None:
    return jnp.round(x)
  bits = jax.random.bits(key, x.shape, "uint16").astype(jnp.float32)
  return jnp.floor(x + (bits + 0.5) * 2.0**-16)
