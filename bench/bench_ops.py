"""Every operator at its sizes, against the peers, in turns."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from bench.measure import OURS, Gate, Group, Measure
from bench.memory import peak_extra
from bench.peers import contenders
from bench.shapes import SHAPES, SHORT, SLOW, missing
from dinofast.ops import OPS
from dinofast.ops.registry import choose

CASES = [
    pytest.param(
        *(op, shape, contender.name),
        id=f"{op}-{shape}-{contender.name}",
        marks=[pytest.mark.slow]
        if (op, shape) in SLOW
        else [pytest.mark.short]
        if (op, shape) in SHORT
        else [],
    )
    for op, shapes in SHAPES.items()
    for shape in shapes
    for contender in contenders(op, shape)
]


@pytest.mark.parametrize(("op", "shape", "contender"), CASES)
def bench_operator(measure: Measure, with_memory: bool, op: str, shape: str, contender: str) -> None:
    if reason := missing(op, shape):
        pytest.skip(reason)
    measure(f"{op} {shape}", contender, lambda: _prepare(op, shape, with_memory))


def _prepare(op: str, shape: str, with_memory: bool) -> Group:
    args = SHAPES[op][shape]()
    gate, cost = Gate(OPS[op], args), OPS[op].cost(*args)
    group = Group({}, {})
    for contender in contenders(op, shape):
        name, call = contender.name, contender.prepare(*args)
        ours = name.startswith(OURS)
        results = contender.read(call())
        known: dict[str, Any] = {
            "backend": choose(OPS[op], args).backend if ours else name,
            "device": str(args[0].device),
            "dtype": str(args[0].dtype).removeprefix("torch."),
            "sizes": [list(x.shape) for x in args if isinstance(x, torch.Tensor)],
            "bytes": cost.bytes,
            "flops": cost.flops,
            "largest_error": gate.kernel(results) if ours else gate.peer(results),
            **contender.tell(call),
        }
        if with_memory:
            known["peak_extra_bytes"] = peak_extra(op, shape, name)
        group.calls[name], group.facts[name] = call, known
        if contender.stages:
            group.stages[name] = partial(contender.stages, call)
    return group
