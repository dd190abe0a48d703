"""Maps the tensors of a Hugging Face checkpoint to our parameters and back.

A table of `Entry` rows pairs a name there with a path here. Tensors that a
checkpoint holds once a layer, or once an expert of each layer, are one stacked
parameter here, and kernels are (out, in) there and (in, out) here. `tensors`
expands a table to one `Tensor`
for each name in the checkpoint; everything else works on that.

Nothing is read before all names and shapes have been checked.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx, traverse_util

from train.common.errors import UserError
from train.common.fields import Fields

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LAYER, EXPERT = "{layer}", "{expert}"
SEPARATOR = "/"
# Fields of config.json, and of our configs, that every model has.
SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "d_model",
  "intermediate_size": "d_ff",
  "num_hidden_layers": "n_layers",
  "num_attention_heads": "n_heads",
}
Shape = tuple[int, ...]
Reader = Callable[[str], np.ndarray]  # reads one tensor, by name


class Entry(NamedTuple):
  """A row of a table: a tensor's name in a checkpoint and our path."""

  # With LAYER in it, and EXPERT: one tensor a layer and expert, one stack here.
  name: str
  path: str
  transpose: bool = False


class Tensor(NamedTuple):
  """A tensor of a checkpoint, and the parameter that it is, or is part of."""

  path: str
  index: tuple[int, ...]  # in the stack, by layer and expert; (): not stacked
  shape: Shape  # in the checkpoint
  transpose: bool

  @property
  def module(self) -> str:
    """The top-level module that the parameter belongs to."""
    return self.path.split(SEPARATOR)[0]


def param_shapes(boxes: nnx.State) -> dict[str, Shape]:
  """The shape of each parameter of an abstract model, by path."""
  leaves: dict[str, Any] = traverse_util.flatten_dict(
    nnx.to_pure_dict(boxes), sep=SEPARATOR
  )
  return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def tensors(
  table: Iterable[Entry], shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
  """Every tensor that a checkpoint must hold, by name.

  Args:
    table: an entry for every parameter of the model; entries for parameters
      that this model does not have (a tied head) are skipped.
    shapes: of our parameters, by path.
  """
  rows = {entry.path: entry for entry in table}
  assert shapes.keys() <= rows.keys(), shapes.keys() - rows.keys()
  expanded = {}
  for path, (name, _, transpose) in rows.items():
    if path not in shapes:
      continue
    stacked = [mark for mark in (LAYER, EXPERT) if mark in name]
    counts, shape = shapes[path][: len(stacked)], shapes[path][len(stacked) :]
    for index in np.ndindex(counts):
      numbered = name
      for mark, i in zip(stacked, index, strict=True):
        numbered = numbered.replace(mark, str(i))
      expanded[numbered] = Tensor(
        path, index, shape[::-1] if transpose else shape, transpose
      )
  return expanded


def check_names(
  source: str,
  missing: Iterable[str],
  unexpected: Iterable[str],
  family: str,
  described: str,
) -> None:
  """Refuses a checkpoint that lacks tensors, or has others.

  Args:
    source: the checkpoint, as messages call it.
    missing: names of tensors that the model needs.
    unexpected: names of tensors that the model has no parameter for.
    family: the architecture, as messages call it.
    described: what config.json says about the model.

  Raises:
    UserError: any name is missing or unexpected.
  """
  for problem, names in (
    ("lacks", sorted(missing)),
    (f"has tensors that a {family} does not have:", sorted(unexpected)),
  ):
    if names:
      raise UserError(
        f"{source} {problem} {some(names)}; its config.json describes"
        f" {described}"
      )


def check_shapes(
  source: str, found: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> None:
  """Refuses a checkpoint with a tensor of another shape.

  Args:
    source: the checkpoint, as messages call it.
    found: shapes in the checkpoint, by name.
    wanted: shapes that its config implies, by the same names.

  Raises:
    UserError: shapes differ; the message has the name and both shapes.
  """
  wrong = [
    f"{name} is {tuple(found[name])}, not {shape}"
    for name, shape in wanted.items()
    if tuple(found[name]) != shape
  ]
  if wrong:
    raise UserError(
      f"{source}: {some(wrong)}; tensors and config.json do not belong together"
    )


def some(names: Sequence[str]) -> str:
  """The first three of the names, and the number of the others."""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def allocate(shapes: Mapping[str, Shape], dtype: str) -> dict[str, np.ndarray]:
  """Zeros for every parameter, by path."""
  return {
    path: np.zeros(shape, DTYPES[dtype]) for path, shape in shapes.items()
  }


def read_into(
  arrays: Mapping[str, np.ndarray],
  wanted: Mapping[str, Tensor],
  read: Reader,
  source: str,
) -> None:
  """Reads tensors into the parameters that they belong to.

  Args:
    arrays: our parameters by path, filled in their own dtype.
    wanted: the tensors, by name.
    read: reads one tensor.
    source: the checkpoint, as messages call it.

  Raises:
    UserError: a number is not finite in the dtype of its parameter.
  """
  for name, (path, index, _, transpose) in wanted.items():
    tensor = read(name)
    target = arrays[path][(*index, ...)]  # a view, even of a scalar
    with np.errstate(over="ignore"):  # found below
      target[...] = tensor.T if transpose else tensor
    check_finite(target, name, source)


def check_finite(tensor: np.ndarray, name: str, source: str) -> None:
  """Refuses weights with which every output would be NaN.

  Args:
    tensor: the weights.
    name: of the tensor.
    source: the checkpoint, as messages call it.

  Raises:
    UserError: a number is NaN or infinite.
  """
  bad = tensor.size - int(np.isfinite(tensor).sum())
  if bad:
    raise UserError(
      f"{source}: {bad:,} of {tensor.size:,} numbers in {name} are not finite"
      f" in {tensor.dtype}; the file is damaged, or its training diverged: use"
      " another, or an earlier checkpoint"
    )


def nested(arrays: Mapping[str, np.ndarray]) -> dict:
  """Parameters as nested dicts, from parameters by path."""
  return traverse_util.unflatten_dict(dict(arrays), sep=SEPARATOR)


def to_tensor(params: Mapping[str, Any], tensor: Tensor) -> np.ndarray:
  """One tensor of a checkpoint, from our parameters as nested dicts."""
  param: Any = params
  for key in tensor.path.split(SEPARATOR):
    param = param[key]
  array = np.asarray(param)[tensor.index]
  return np.ascontiguousarray(array.T if tensor.transpose else array)


def sizes_from_hf(fields: Fields) -> dict[str, int]:
  """The sizes in a config.json, under the names of our configs.

  Raises:
    UserError: one is missing, or no whole number above 0.
  """
  missing = [name for name in SIZES if not fields.has(name)]
  if missing:
    raise UserError(f"{fields.source} has no {', '.join(missing)}")
  return {ours: fields.integer(theirs, low=1) for theirs, ours in SIZES.items()}


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
  """Puts the file before the errors of a config that is made from it."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{source}: {error}") from None


def sizes_to_hf(config: Any) -> dict[str, int]:
  """The sizes of a model under the names of config.json."""
  return {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}


def refuse_variants(
  source: str, fields: Mapping[str, tuple[Any, Sequence[Any]]]
) -> None:
  """Refuses a config.json that describes a model which is not implemented.

  Args:
    source: the config.json, as messages call it.
    fields: the value of each field, and the values that are implemented.

  Raises:
    UserError: a value is not among them.
  """
  for name, (value, implemented) in fields.items():
    if value not in implemented:
      raise UserError(
        f"{source}: {name} is {value!r}; this model computes"
        f" {' or '.join(map(repr, implemented))} only"
      )
