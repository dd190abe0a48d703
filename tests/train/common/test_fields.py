import os

import pytest

from train.common import inputs
from train.common.errors import UserError
from train.common.fields import Fields

VALUES = {
  "layers": 2,
  "eps": 1e-5,
  "tied": False,
  "name": "a",
  "ends": [1, 2],
  "rope": {"type": "default"},
  "token": {"content": "</s>"},
  "none": None,
}
ALL = Fields("model/config.json", VALUES)


def test_fields_are_read_by_type():
  assert ALL.integer("layers", low=1) == 2
  assert ALL.number("layers") == 2.0 and ALL.number("eps") == 1e-5
  assert ALL.flag("tied") is False and ALL.text("name") == "a"
  assert ALL.integers("ends") == (1, 2) and ALL.integers("layers") == (2,)
  assert ALL.group("rope").text("type") == "default"
  assert ALL.token("token") == "</s>" and ALL.token("name") == "a"
  assert ALL.choice("name", ("a", "b")) == "a"


def test_null_stands_for_an_absent_field():
  for name in ("none", "absent"):
    assert ALL.integer(name, 7) == 7 and ALL.token(name) == ""
    assert ALL.group(name).values == {}
    with pytest.raises(UserError, match=rf"model/config\.json has no {name}$"):
      ALL.number(name)


@pytest.mark.parametrize(
  ("value", "kind", "expected"),
  [
    ("2", "integer", "a whole number"),
    (True, "integer", "a whole number"),
    (2.0, "integer", "a whole number"),
    (-1, "integer", "from 0"),
    (2**31, "integer", "to 2147483647"),
    ("1e-05", "number", "a number"),
    (float("nan"), "number", "a number"),
    (10**400, "number", "a number"),
    (1, "flag", "true or false"),
    (3, "text", "a text"),
    ("\ud800", "text", "a text"),
    ([1, "2"], "integers", "whole numbers"),
    (["a", 1], "texts", "a list of texts"),
    ([], "group", "an object"),
    ({"content": 3}, "token", "a text"),
  ],
)
def test_a_wrong_type_is_named_with_file_and_field(value, kind, expected):
  fields = Fields("model/config.json", {"x": value})
  with pytest.raises(UserError) as raised:
    getattr(fields, kind)("x")
  text = str(raised.value)
  assert text.startswith("model/config.json: x") and expected in text
  assert "\n" not in text


def test_a_field_of_an_inner_object_is_named_with_the_outer():
  fields = Fields("c.json", {"rope": {"factor": "4"}})
  with pytest.raises(UserError, match=r"c\.json: rope\.factor is \"4\"; it"):
    fields.group("rope").number("factor")


def test_a_long_value_is_cut_off():
  with pytest.raises(UserError) as raised:
    Fields("c.json", {"x": "y" * 10_000}).integer("x")
  assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
  ("content", "says"),
  [
    (b"\xff{}", "byte 0 is not UTF-8"),
    (b"{", "cannot be read as JSON"),
    (b"[1]", r"not hold a JSON object, but \[1\]"),
    (b"[" * 100_000, "cannot be read as JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
  ],
)
def test_what_is_no_object_is_refused(content, says, tmp_path):
  path = tmp_path / "c.json"
  path.write_bytes(content)
  with pytest.raises(UserError, match=rf"c\.json .*{says}"):
    inputs.read_object(path)


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for name, says in (
    (".", "it is a folder"),
    ("none", "it is missing"),
    ("pipe", "not a regular file"),
  ):
    with pytest.raises(UserError, match=says):
      inputs.read_bytes(tmp_path / name)


def test_panics_become_errors_and_interrupts_do_not():
  class Panic(BaseException):
    pass

  with (
    pytest.raises(UserError, match=r"a\.json cannot be read \(at line 3\)"),
    inputs.refusing("a.json cannot be read"),
  ):
    raise Panic("at line 3\nstack")
  with pytest.raises(KeyboardInterrupt), inputs.refusing("a"):
    raise KeyboardInterrupt
  with pytest.raises(UserError, match=r"^b$"), inputs.refusing("a"):
    raise UserError("b")
