"""The tokenizer in a GGUF file as a tokenizer.json."""

from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from train.common import inputs
from train.common.fields import Fields

# The types of tokens that are no part of a text: <|endoftext|>; and of those
# that are, but are never cut: <tool_call>.
CONTROL, USER_DEFINED = 3, 4


class Pre(NamedTuple):
  """What happens to a text before its bytes are merged."""

  pattern: str = ""  # cuts the text; "": as GPT-2's does
  single_digits: bool = False
  nfc: bool = False  # whether characters are composed first
  ignore_merges: bool = False  # whether words of the vocabulary stay whole


# Both are the same but for the number of digits in a piece.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# By `tokenizer.ggml.pre`.
KNOWN = {
  "gpt-2": Pre(),
  "smollm": Pre(single_digits=True),
  "llama-bpe": Pre(
    CONTRACTIONS + WORDS + r"|\p{N}{1,3}" + REST, ignore_merges=True
  ),
  "qwen2": Pre(CONTRACTIONS + WORDS + r"|\p{N}" + REST, nfc=True),
}


def to_json(fields: Fields) -> str:
  """The text of a tokenizer.json, from the byte-level BPE in the file.

  Returns:
    "" for any other tokenizer, after a note is printed.
  """
  kind = fields.text("tokenizer.ggml.model", None)
  name = fields.text("tokenizer.ggml.pre", None)
  if kind != "gpt2" or name not in KNOWN:
    print(
      f"note: {fields.source} has a tokenizer {kind}/{name}, which cannot be"
      f" converted (only gpt2/{', gpt2/'.join(KNOWN)} can); put the"
      " model's own tokenizer.json beside the weights"
    )
    return ""
  pre = KNOWN[name]
  tokenizer = tokenizers.Tokenizer(_model(fields, pre))
  tokenizer.pre_tokenizer = _pre_tokenizer(pre)
  tokenizer.decoder = decoders.ByteLevel()
  if pre.nfc:
    tokenizer.normalizer = normalizers.NFC()
  tokens = fields.texts("tokenizer.ggml.tokens")
  kinds = fields.integers("tokenizer.ggml.token_type", ())
  of = lambda kind: [
    token for token, k in zip(tokens, kinds, strict=False) if k == kind
  ]
  tokenizer.add_special_tokens(of(CONTROL))
  tokenizer.add_tokens(of(USER_DEFINED))
  return tokenizer.to_str()


def _model(fields: Fields, pre: Pre) -> models.BPE:
  """The vocabulary and its merges."""
  tokens = fields.texts("tokenizer.ggml.tokens")
  pairs = [m.split(" ", 1) for m in fields.texts("tokenizer.ggml.merges")]
  if any(len(pair) != 2 for pair in pairs):
    fields.refuse("tokenizer.ggml.merges", "pairs with a space between them")
  vocabulary = {token: i for i, token in enumerate(tokens)}
  with inputs.refusing(f"{fields.source}: its tokenizer cannot be used"):
    merges = [(first, second) for first, second in pairs]
    return models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges)


def _pre_tokenizer(pre: Pre) -> pre_tokenizers.PreTokenizer:
  """Cuts a text into the pieces within which bytes are merged."""
  steps: list[pre_tokenizers.PreTokenizer] = []
  if pre.single_digits:
    steps.append(pre_tokenizers.Digits(individual_digits=True))
  if pre.pattern:
    pattern = tokenizers.Regex(pre.pattern)
    steps.append(pre_tokenizers.Split(pattern, behavior="isolated"))
  level = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=not pre.pattern
  )
  return pre_tokenizers.Sequence([*steps, level])
