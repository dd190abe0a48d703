"""Collectives of written and of compiled programs."""

import dataclasses

import jax
import pytest

from train.estimate import collectives

TEXT = """\
HloModule m

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %ag = f32[64,16]{1,0} all-gather(%x), channel_id=1
  %part = f32[64,16]{1,0} all-gather(%x), channel_id=1
}

%count (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%until (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%some (p: (s32[], s32[])) -> (s32[], s32[]) {
  %r = bf16[4,4] all-reduce(%q), channel_id=2, to_apply=%add
}

%yes (p: f32[]) -> f32[] {
  %rs = f32[2,4] reduce-scatter(%big), channel_id=3, dimensions={0}
  %big = f32[16,4] add(%a, %b)
}

%no (p: f32[]) -> f32[] {
  %self = f32[2,4] all-reduce(%a), channel_id=4, replica_groups={{0},{1}}
}

ENTRY %main (a: f32[]) -> f32[] {
  %w = (s32[], f32[8,16]) while(%t), condition=%count, body=%body
  %v = (s32[], s32[]) while(%t), condition=%until, body=%some
  ROOT %c = f32[] conditional(%i, %a, %b), branch_computations={%no, %yes}
}
"""


def test_collectives_are_read_with_their_loops_and_branches():
  found = collectives.Module(TEXT).collectives()
  assert [(x.kind, x.times, x.always, x.bytes) for x in found] == [
    ("all-gather", 5, True, 64 * 16 * 4),  # its parts share a channel
    ("all-reduce", 1, False, 4 * 4 * 2),  # the loop's length is not known
    ("reduce-scatter", 1, False, 16 * 4 * 4),  # what it reduces
  ]
  sums = collectives.totals(found)
  assert sums["every_step"] == {"all-gather": {"count": 5, "bytes": 5 * 4096}}
  assert "all-gather, every step" in collectives.lines(sums)[0]


def test_collectives_of_shard_map_share_a_channel_and_count_each():
  name = 'metadata={op_name="jit(f)/shard_map/psum"}'
  text = "\n".join(
    [
      "ENTRY %main (a: f32[]) -> f32[] {",
      f"  %x = f32[8,16] all-reduce(%a), channel_id=1, {name}",
      f"  %y = f32[8,16] all-reduce(%b), channel_id=1, {name}",
      "}",
    ]
  )
  assert len(collectives.Module(text).collectives()) == 2
  apart = text.replace("shard_map/", "")
  assert len(collectives.Module(apart).collectives()) == 1


def test_bytes_sent_in_a_ring():
  like = collectives.Collective("all-reduce", "s8", (80,), 80, 3, True, "")
  sent = lambda kind: collectives.sent_bytes(
    dataclasses.replace(like, kind=kind), 8
  )
  assert sent("all-reduce") == sent("reduce-scatter") + sent("all-gather")
  assert sent("all-to-all") == 70
  assert sent("collective-permute") == 80


@pytest.mark.parametrize(
  ("shape", "name"),
  [
    ((512, 1376), "G"),
    ((8, 1376, 64), "G"),
    ((512, 96), "P or R"),
    ((12, 172), "P or R"),
    ((96, 96), "r x r"),
    ((96,), "other"),
    ((4096, 512), "other"),
  ],
)
def test_arrays_are_told_by_their_shapes(shape, name):
  matrices = [(512, 512), (512, 1376)]
  assert collectives.named(shape, matrices, 96, [8]) == name


def test_collectives_of_a_compiled_program():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.NamedSharding(mesh, jax.P("x", None))
  whole = jax.NamedSharding(mesh, jax.P())
  x = jax.ShapeDtypeStruct((64, 16), "float32", sharding=rows)
  step = jax.jit(lambda x: (x + 1, x.sum()), out_shardings=(whole, whole))
  found = collectives.Module(step.lower(x).compile().as_text()).collectives()
  sizes = {(x.kind, x.bytes, x.always) for x in found}
  assert ("all-gather", 64 * 16 * 4, True) in sizes
  assert ("all-reduce", 4, True) in sizes
