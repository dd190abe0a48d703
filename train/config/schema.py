"""The config of a run: frozen dataclasses and `--set a.b=c` overrides.

Every field has a default, a comment that `--help` shows, and a check in
`__post_init__`, so that a wrong value is reported before anything starts. The
values of a run come from `train/config/presets.py`.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from train.common.checks import check_above
from train.common.errors import UserError
from train.common.fields import Fields
from train.config import families
from train.config.families import BiasName, FamilyName, ScalingName
from train.methods import registry
from train.methods.options import OptimizerConfig, SharedOptimizerConfig

Dtype = Literal["float32", "bfloat16"]
HUB = "hub:"  # prefix of the names of datasets and tokenizers on the hub
AttentionName = Literal["auto", "xla", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class SharedModelConfig:
  """How a model is stored and computed."""

  dtype: Dtype = "float32"  # dtype of the computation
  param_dtype: Dtype = "float32"  # dtype of the stored weights
  # how the block matrices are stored; full means in param_dtype
  weights: Literal["full", "int8", "int4", "float8"] = "full"
  # layers that one iteration of the scan runs: higher compiles longer and runs
  # faster
  unroll: int = 1
  # what the backward pass recomputes instead of reading it from memory: nothing
  # (none), whole layers (full), or all of a layer but its matrix products
  # (dots)
  remat: Literal["none", "full", "dots"] = "none"
  # implementation of attention; auto picks one for the device
  attention: AttentionName = "auto"

  def __post_init__(self):
    check_above("model", self, ("unroll",))


@dataclasses.dataclass(frozen=True)
class ModelConfig(SharedModelConfig):
  """A LLaMA decoder, or one of its relatives."""

  # what Hugging Face calls the model: it decides which of the parts below the
  # model may have, and how it is exported
  family: FamilyName = "llama"
  # size of the vocabulary; the tokenizer may use fewer ids
  vocab_size: int = 4096
  d_model: int = 256  # width of the residual stream
  d_ff: int = 688  # width of the feed-forward layers (SwiGLU)
  n_layers: int = 4  # number of blocks
  n_heads: int = 4  # number of query heads
  # number of key and value heads (grouped-query attention); 0: as many as query
  # heads
  n_kv_heads: int = 0
  head_dim: int = 0  # width of a head; 0: d_model / n_heads
  # projections of the attention that have biases: those of queries, keys and
  # values (qkv), or all four
  attention_bias: BiasName = "none"
  mlp_bias: bool = False  # whether the feed-forward layers have biases
  # feed-forward layers of width d_ff in each block, of which a token takes
  # n_active_experts; 0: one that all tokens take
  n_experts: int = 0
  n_active_experts: int = 2  # experts of a token
  # whether the weights of a token's experts add up to 1
  norm_topk_prob: bool = True
  # weight in the loss of how unbalanced the experts are; 0: none
  router_aux_loss_coef: float = 0.001
  qk_norm: bool = False  # normalize each head's queries and keys by RMSNorm
  # positions that a position attends to, with itself; 0: all before it
  sliding_window: int = 0
  # numbers of the layers with the sliding window, such as 2,3; empty: all
  window_layers: str = ""
  rope_theta: float = 10000.0  # base of the rotary position embeddings
  # numbers of the layers without rotary embeddings, such as 3,7; empty: none
  no_rope_layers: str = ""
  # how rotary embeddings are slowed down for longer texts
  rope_scaling: ScalingName = "none"
  rope_factor: float = 1.0  # how many times slower they are
  # length that the model was trained on before that; for llama3 and yarn
  rope_original_length: int = 0
  # llama3: rotations in that length up to which a frequency is divided by the
  # factor
  rope_low: float = 1.0
  rope_high: float = 4.0  # llama3: rotations from which it is kept
  rope_beta_fast: float = 32.0  # yarn: rotations from which it is kept
  rope_beta_slow: float = 1.0  # yarn: rotations up to which it is divided
  # yarn: factor on rotated queries and keys; 0: 0.1 ln(rope_factor) + 1
  rope_attention_factor: float = 0.0
  norm_eps: float = 1e-6  # term added to the mean square in RMSNorm
  init_std: float = 0.02  # standard deviation of fresh weights
  tie_embeddings: bool = False  # use the transposed embedding as the head

  @property
  def kv_heads(self) -> int:
    """Number of key/value heads."""
    return self.n_kv_heads or self.n_heads

  @property
  def head_width(self) -> int:
    """Features of one head."""
    return self.head_dim or self.d_model // self.n_heads

  @property
  def layers_without_rope(self) -> tuple[int, ...]:
    """Numbers of the layers without rotary embeddings."""
    return families.layer_numbers(
      "no_rope_layers", self.no_rope_layers, self.n_layers
    )

  @property
  def layers_with_window(self) -> Sequence[int]:
    """Numbers of the layers with a sliding window."""
    if not self.sliding_window:
      return ()
    return families.layer_numbers(
      "window_layers", self.window_layers, self.n_layers
    ) or range(self.n_layers)

  def __post_init__(self):
    super().__post_init__()
    sizes = ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads")
    check_above("model", self, (*sizes, "rope_theta", "norm_eps", "init_std"))
    unset = ("head_dim", "sliding_window", "rope_original_length", "n_experts")
    check_above("model", self, unset, low=-1)
    unset = ("rope_attention_factor", "router_aux_loss_coef")
    check_above("model", self, unset, low=-1e-9)
    self._check_heads()
    families.check(self)
    families.check_rope(self)
    if self.window_layers and not self.sliding_window:
      raise UserError(
        f"model.window_layers is {self.window_layers!r:.60}, but there is no"
        " window; set model.sliding_window"
      )
    _ = self.layers_with_window, self.layers_without_rope  # checked there

  def _check_heads(self) -> None:
    """Raises unless the heads have an even width and share keys evenly."""
    if self.head_dim % 2:
      raise UserError(
        f"model.head_dim is {self.head_dim}; heads have an even width"
      )
    if not self.head_dim and self.d_model % (2 * self.n_heads):
      raise UserError(
        f"model.d_model is {self.d_model}, which does not split into"
        f" model.n_heads={self.n_heads} heads of even width; use a multiple"
        f" of {2 * self.n_heads}"
      )
    if self.n_kv_heads < 0 or self.n_heads % self.kv_heads:
      raise UserError(
        f"model.n_kv_heads is {self.n_kv_heads}, which does not divide"
        f" model.n_heads={self.n_heads}"
      )


@dataclasses.dataclass(frozen=True)
class SharedDataConfig:
  """What is read, and how it is cut into batches."""

  # training data: a file, a folder, a glob, hub:NAME or hub:NAME:SUBSET; empty:
  # the bundled text
  path: str = ""
  split: str = "train"  # split of a hub dataset to train on
  # evaluation data: a split of the hub dataset, or local files. Empty: the
  # dataset's `validation` split if it has one. none: documents held out from
  # the training data
  validation: str = ""
  revision: str = ""  # branch, tag or commit of a hub dataset
  # how documents fill rows: packed end to end, or one document a row, cut off
  # and padded, as in the papers
  rows: Literal["packed", "padded"] = "packed"
  length: int = 128  # tokens predicted in each row
  batch: int = 16  # rows in a global batch
  holdout_every: int = 20  # hold out one document in this many
  eval_rows: int = 512  # maximum number of held-out rows in an evaluation
  prefetch: int = 4  # batches prepared ahead of the step; 0: none
  # folder for the tokenizer and the tokenized text; empty:
  # ~/.cache/galore_optax
  cache: str = ""  # tokenizer and tokenized text; "": ~/.cache/galore_optax

  def __post_init__(self):
    check_above("data", self, ("length", "batch", "eval_rows"))
    check_above("data", self, ("holdout_every",), low=1)
    check_above("data", self, ("prefetch",), low=-1)
    _check_hub_name("path", self.path)
    if not self.split:
      raise UserError("data.split is empty; give its name")


@dataclasses.dataclass(frozen=True)
class DataConfig(SharedDataConfig):
  """Text, and how it is cut into batches."""

  text_field: str = "text"  # column that holds the text
  # what a document is in a .txt file
  documents: Literal["paragraph", "line", "file"] = "paragraph"
  # read and tokenize on demand instead of up front; auto: only for hub datasets
  stream: Literal["auto", "true", "false"] = "auto"
  # a tokenizer.json or .model file, or hub:NAME; empty: trained on the text
  tokenizer: str = ""
  # token that ends every document; empty: the tokenizer's own
  end_token: str = ""
  # documents of a stream that are shuffled together
  shuffle_buffer: int = 10_000

  def __post_init__(self):
    super().__post_init__()
    check_above("data", self, ("shuffle_buffer",))
    _check_hub_name("tokenizer", self.tokenizer)
    if self.end_token and not self.tokenizer:
      raise UserError(
        f"data.end_token is {self.end_token!r}, but the tokenizer that is"
        " trained here has its own; name another with data.tokenizer"
      )
    if not self.text_field:
      raise UserError("data.text_field is empty; give its name")


def _check_hub_name(field: str, value: str) -> None:
  """Raises where `hub:` is followed by no name."""
  if value.startswith(HUB) and not value.removeprefix(HUB).strip(":"):
    raise UserError(f"data.{field} is {value!r}; write {HUB}NAME")


@dataclasses.dataclass(frozen=True)
class SharedTrainConfig:
  """How long to train, and what a step is."""

  steps: int = 400  # training steps, each of one batch; skipped steps count
  # folder of weights to start from, or of a run; empty: fresh weights
  init: str = ""
  seed: int = 0  # seed of the weights and of the data order
  accumulate: int = 1  # microbatches of a batch, whose gradients are added up
  # stop after this many steps in a row without a finite gradient
  max_skips: int = 10
  # compute gradients of projected matrices at rank r, never whole
  lean: bool = False
  # how 8-bit weights are rounded
  rounding: Literal["stochastic", "nearest"] = "stochastic"

  def __post_init__(self):
    check_above("train", self, ("steps", "accumulate", "max_skips"))


@dataclasses.dataclass(frozen=True)
class TrainConfig(SharedTrainConfig):
  """How long to train, and what a step is."""

  # weight of the squared log-normalizer in the loss; 0: none
  z_loss: float = 0.0
  layerwise: bool = False  # update each layer inside the backward pass

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.z_loss < math.inf:
      raise UserError(f"train.z_loss must be 0 or above, got {self.z_loss}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh, and the processes that own them."""

  data: int = 0  # copies of the model; 0: all devices that the other axes leave
  fsdp: int = 1  # devices that share the weights and the batch
  tensor: int = 1  # devices that share the heads and the feed-forward units
  # how gradients are sent to be added up over data: as float32, or as eight-bit
  # codes (int8, with train.lean), which are a quarter of the bytes
  reduce: Literal["float32", "int8"] = "float32"
  # host:port of process 0; auto: from the cluster. Empty: auto under a launcher
  # known to start several processes, otherwise a single process
  coordinator: str = ""
  processes: int = 0  # number of processes; 0: from the cluster's environment
  # index of this process, from 0; -1: from the cluster's environment
  process: int = -1
  # seconds without a sign of life after which a process counts as lost, and
  # the others end
  lost_after: int = 30
  # keep the optimizer's state in host memory; needs train.layerwise
  offload: Literal["none", "optimizer"] = "none"

  def __post_init__(self):
    check_above("mesh", self, ("data", "processes"), low=-1)
    check_above("mesh", self, ("lost_after",))
    check_above("mesh", self, ("process",), low=-2)
    check_above("mesh", self, ("fsdp", "tensor"))
    if self.coordinator not in ("", "auto") and ":" not in self.coordinator:
      raise UserError(
        f"mesh.coordinator is {self.coordinator!r}; give host:port of process"
        " 0, or auto"
      )
    if self.processes and self.process >= self.processes:
      raise UserError(
        f"mesh.process is {self.process}; of mesh.processes={self.processes}"
        f" it must be one of 0 to {self.processes - 1}"
      )


@dataclasses.dataclass(frozen=True)
class SharedRunConfig:
  """What is reported and saved; a resumed run may change these."""

  eval_every: int = 100  # steps between two evaluations
  log_every: int = 10  # steps between two lines of metrics.jsonl
  # steps between two checkpoints; the last step is always saved
  checkpoint_every: int = 100
  keep: int = 2  # number of newest checkpoints to keep
  # number of checkpoints with the lowest held-out loss to keep besides; 0: none
  keep_best: int = 1
  # where metrics also go: tensorboard, wandb, or both with a comma
  sinks: str = ""

  def __post_init__(self):
    check_above("run", self, ("eval_every", "log_every", "checkpoint_every"))
    check_above("run", self, ("keep",))
    check_above("run", self, ("keep_best",), low=-1)


@dataclasses.dataclass(frozen=True)
class RunConfig(SharedRunConfig):
  """What is reported and saved; a resumed run may change these."""

  # start of the text sampled at the end
  prompt: str = "The people of the United States"
  sample_tokens: int = 64  # length of that text in tokens; 0: none
  temperature: float = 0.7  # temperature of the sampling
  # matrices whose subspaces are measured: auto, none, or names and patterns
  # such as attn.q.0,mlp.*.3
  watch: str = "auto"
  # steps between two measurements of a matrix; 0: rarely, at refreshes
  watch_every: int = 0

  def __post_init__(self):
    super().__post_init__()
    check_above("run", self, ("temperature",))
    check_above("run", self, ("sample_tokens", "watch_every"), low=-1)
    if not self.prompt:
      raise UserError("run.prompt is empty; give it a few words")


_SHARED_OPTIMIZER = SharedOptimizerConfig()
_OPTIMIZER = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class SharedConfig:
  """What pre-training and fine-tuning runs have in common."""

  # Hints for fields that this kind of run does not have, by their names, or
  # by that of their group.
  HINTS: ClassVar[Mapping[str, str]] = {}

  preset: str
  model: SharedModelConfig = SharedModelConfig()
  # copies of the model; 0: all devices that the other axes leave
  data: SharedDataConfig = SharedDataConfig()
  optimizer: SharedOptimizerConfig = _SHARED_OPTIMIZER
  train: SharedTrainConfig = SharedTrainConfig()
  mesh: MeshConfig = MeshConfig()
  run: SharedRunConfig = SharedRunConfig()

  def __post_init__(self):
    method = registry.get(self.optimizer.name)
    method.check(self.optimizer)
    if self.train.lean:
      self._check_lean(method)
    layerwise = isinstance(self.train, TrainConfig) and self.train.layerwise
    if self.mesh.offload != "none" and not layerwise:
      raise UserError(
        f"mesh.offload={self.mesh.offload} brings the state of one layer at a"
        " time to the device, for updates that are layer by layer; pre-train"
        " with --layerwise, or leave mesh.offload at none"
      )
    if self.mesh.reduce != "float32":
      self._check_reduce(layerwise)
    if method.factors and self.model.weights != "full":
      raise UserError(
        f"model.weights={self.model.weights} is for weights that are trained,"
        f" not for optimizer.name={self.optimizer.name}; leave it at full, and"
        " take optimizer.name=qlora for frozen weights of four bits"
      )

  def _check_reduce(self, layerwise: bool) -> None:
    """Raises where gradients cannot be sent in eight bits."""
    name = f"mesh.reduce={self.mesh.reduce}"
    keep = "or leave mesh.reduce at float32"
    if not isinstance(self.train, TrainConfig):
      raise UserError(
        f"{name} is for pre-training with --lean, not for fine-tuning; leave"
        " mesh.reduce at float32"
      )
    if not self.train.lean:
      raise UserError(
        f"{name} sends gradients at rank r, and train.lean is false; give"
        f" --lean, {keep}"
      )
    if layerwise:
      raise UserError(
        f"{name} adds up the gradients of all layers at the end of the backward"
        f" pass, and train.layerwise keeps one layer's; leave train.layerwise"
        f" false, {keep}"
      )
    for axis in ("fsdp", "tensor"):
      if (size := getattr(self.mesh, axis)) > 1:
        raise UserError(
          f"{name} needs the whole model on each device, and mesh.{axis} is"
          f" {size}; set mesh.{axis}=1, so that mesh.data takes the devices,"
          f" {keep}"
        )
    if experts := getattr(self.model, "n_experts", 0):
      raise UserError(
        f"{name} sees one device's rows at a time, and model.n_experts is"
        f" {experts}, whose balance is one of all rows; leave mesh.reduce at"
        " float32"
      )

  def _check_lean(self, method: registry.Method) -> None:
    """Raises where projected gradients are not enough."""
    if not method.lean:
      raise UserError(
        "train.lean computes gradients at rank r, and"
        f" optimizer.name={self.optimizer.name} needs more of them; use one of"
        f" {', '.join(m.name for m in registry.METHODS.values() if m.lean)}"
      )
    if self.optimizer.residual != "none":
      raise UserError(
        f"optimizer.residual={self.optimizer.residual} needs whole gradients,"
        " which train.lean never computes; set optimizer.residual=none, or in"
        " pre-training give --lean instead of train.lean=true"
      )
    if self.optimizer.projector != "subspace":
      raise UserError(
        f"optimizer.projector={self.optimizer.projector} needs whole"
        " gradients, which train.lean never computes; use subspace"
      )


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
  """A pre-training run."""

  model: ModelConfig = ModelConfig()
  # copies of the model; 0: all devices that the other axes leave
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = _OPTIMIZER
  train: TrainConfig = TrainConfig()
  run: RunConfig = RunConfig()

  @property
  def parts(self) -> int:
    """Number of microbatches; a step processes one at a time."""
    return self.train.accumulate * self.optimizer.accumulate

  def __post_init__(self):
    super().__post_init__()
    if self.train.layerwise and self.train.accumulate > 1:
      raise UserError(
        f"train.accumulate is {self.train.accumulate}, but train.layerwise"
        " never has whole gradients to add up; use optimizer.accumulate, which"
        " adds up projected gradients"
      )
    if self.train.accumulate > 1 and self.optimizer.accumulate > 1:
      raise UserError(
        "train.accumulate and optimizer.accumulate both divide the batch into"
        " microbatches; use one of them"
      )
    name = self.optimizer.name
    method = registry.get(name)
    if self.train.layerwise and method.one_layer:
      raise UserError(
        "train.layerwise updates one layer after the other inside the backward"
        f" pass, and optimizer.name={name} {method.one_layer}, or leave"
        " train.layerwise false"
      )


AnyConfig = TypeVar("AnyConfig", bound=SharedConfig)

# What a resumed run may change. These fields do not affect the results, except
# for rounding, and for dropout if a batch has other microbatches.
FREE_GROUPS = ("preset", "mesh", "run")
FREE_FIELDS = (
  "data.cache",
  "data.prefetch",
  "train.accumulate",
  "train.max_skips",
  "task.evaluations",  # of fine-tuning
  "task.export",
)


def flatten(config: SharedConfig) -> dict[str, Any]:
  """The fields as `{"model.d_model": 256, ...}`."""
  flat: dict[str, Any] = {}
  for group, value in dataclasses.asdict(config).items():
    if isinstance(value, dict):
      flat |= {f"{group}.{name}": v for name, v in value.items()}
    else:
      flat[group] = value
  return flat


def fixed_fields(flat: dict[str, Any]) -> dict[str, Any]:
  """The fields that a resumed run must share with the run it continues."""
  return {
    name: value
    for name, value in flat.items()
    if name.partition(".")[0] not in FREE_GROUPS and name not in FREE_FIELDS
  }


Group = TypeVar("Group")


def read_group(kind: type[Group], name: str, fields: Fields) -> Group:
  """One group of a config, from the flat fields in a run's config.json.

  Fields that an older version did not have get their defaults.

  Args:
    kind: the group's dataclass.
    name: the group, as in `model`.
    fields: those of the file.

  Raises:
    UserError: a value has a wrong type, or another version wrote the file.
  """
  kinds, prefix = typing.get_type_hints(kind), f"{name}."
  names = [n for n in fields.values if n.startswith(prefix)]
  unknown = [n for n in names if n.removeprefix(prefix) not in kinds]
  if unknown:
    raise UserError(
      f"{fields.source} was written by another version (it has"
      f" {', '.join(unknown[:3])})"
    )
  values = {
    n.removeprefix(prefix): _read(kinds[n.removeprefix(prefix)], n, fields)
    for n in names
  }
  try:
    return kind(**values)
  except UserError as error:
    raise UserError(f"{fields.source}: {error}") from None


def _read(kind: Any, name: str, fields: Fields) -> Any:
  """A field of a run's config.json, of the type that its group declares."""
  if typing.get_origin(kind) is Literal:
    return fields.choice(name, typing.get_args(kind))
  if kind is bool:
    return fields.flag(name)
  if kind is int:
    return fields.integer(name, low=-(2**63), high=2**63 - 1)
  if kind is float:
    return fields.number(name)
  return fields.text(name)


def override(config: AnyConfig, settings: Sequence[str]) -> AnyConfig:
  """Applies `group.field=value` settings, in order.

  Args:
    config: where to start.
    settings: texts such as `optimizer.rank=32`.

  Returns:
    The changed config, all checks run again.

  Raises:
    UserError: no `=`, no such field, or a value of another type.
  """
  changes: dict[str, dict[str, Any]] = {}
  for setting in settings:
    name, equals, text = setting.partition("=")
    if not equals:
      raise UserError(
        f"--set {setting!r} has no '='; write --set group.field=value"
      )
    group, field, kind = _find(config, name.strip())
    changes.setdefault(group, {})[field] = parse(name, text.strip(), kind)
  # At once: checks that span fields or groups see all changes together.
  groups: dict[str, Any] = {
    group: dataclasses.replace(getattr(config, group), **fields)
    for group, fields in changes.items()
  }
  return dataclasses.replace(config, **groups)


def setting(settings: Sequence[str], wanted: str) -> str:
  """What `group.field=value` settings set a field to; "" if none does."""
  found = ""
  for each in settings:
    name, _, text = each.partition("=")
    if name.strip() == wanted:
      found = text.strip()
  return found


def _find(config: SharedConfig, name: str) -> tuple[str, str, Any]:
  """Group, field and type that a name stands for."""
  group, _, field = name.partition(".")
  groups = [n for n, v in vars(config).items() if dataclasses.is_dataclass(v)]
  if group not in groups:
    raise UserError(
      f"--set {name}: there is no group {group!r}; the groups are"
      f" {', '.join(groups)}"
    )
  kinds = typing.get_type_hints(type(getattr(config, group)))
  if field not in kinds:
    hint = config.HINTS.get(name) or config.HINTS.get(group)
    raise UserError(
      f"--set {name}: {group} has no field {field!r}; its fields are"
      f" {', '.join(kinds)}" + (f". {hint}" if hint else "")
    )
  return group, field, kinds[field]


def parse(name: str, text: str, kind: Any) -> Any:
  """Reads `text` as a value of type `kind`: bool, int, float, str, Literal."""
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    if text not in choices:
      raise UserError(
        f"--set {name}={text}: must be one of {', '.join(choices)}"
      )
    return text
  readers: dict[type, Any] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: lambda t: int(t.replace("_", "")),
    float: float,
    str: str,
  }
  try:
    return readers[kind](text.lower() if kind is bool else text)
  except (ValueError, KeyError):
    expected = "true or false" if kind is bool else f"of type {kind.__name__}"
    raise UserError(f"--set {name}={text}: must be {expected}") from None
