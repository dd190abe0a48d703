"""The config of a BERT or RoBERTa encoder."""

import dataclasses
from typing import Literal

from train.common.errors import UserError

Head = Literal["none", "classify", "spans"]


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of an encoder, its head, and how it is computed."""

  vocab_size: int
  d_model: int
  d_ff: int
  n_layers: int
  n_heads: int
  family: Literal["bert", "roberta"] = "bert"
  max_length: int = 512  # positions with an embedding of their own
  position_offset: int = 0  # rows of the table before position 0; RoBERTa: 2
  n_types: int = 2  # segments; RoBERTa: 1
  pad_id: int = 0
  norm_eps: float = 1e-12
  activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
  init_std: float = 0.02
  dropout: float = 0.1  # of embeddings and of each sublayer's output
  attention_dropout: float = 0.1  # of attention weights
  head_dropout: float = 0.1  # before the head
  head: Head = "none"
  labels: int = 2  # outputs of the classification head; 1: regression
  # The input of the head: a text's first token, or the mean of its tokens.
  pool: Literal["first", "mean"] = "first"
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "full", "dots"] = "none"
  unroll: int = 1
  attention: Literal["auto", "xla", "cudnn"] = "auto"

  def __post_init__(self):
    if self.d_model % self.n_heads:
      raise UserError(
        f"the encoder's d_model is {self.d_model}, which is not divisible by"
        f" its n_heads, {self.n_heads}"
      )
    if self.labels < 1:
      raise UserError(f"the encoder's labels is {self.labels}; give 1 or more")
    for name in ("dropout", "attention_dropout", "head_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(
          f"the encoder's {name} must lie in [0, 1), got {getattr(self, name)}"
        )

  @property
  def head_width(self) -> int:
    """Features of one attention head."""
    return self.d_model // self.n_heads
