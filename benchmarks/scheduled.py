"""A torch.compile backend that compiles nothing: inductor plans the kernels of every graph, and their cost is reported.

The graphs run on fake tensors, so nothing has to be computed; they go through dynamo, AOT autograd's partitioning and
inductor's own lowering and fusion, as they do in training. Without a card inductor plans for its C++ backend; Triton's
may fuse differently, and more: one kernel, there, reduces and uses the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode

Report = Callable[[int, int, Callable[[], Sequence[Any]]], Sequence[Any]]
"""Called with a graph's kernels, the bytes they read and write, and a function that gives its outputs."""


class _Planned(Exception):
    """Ends a compilation when the kernels are known, before any is built."""


class Scheduler:
    """The backend. `graphs`: (kernels, bytes) of every graph planned so far, forward and backward ones apart."""

    def __init__(self, report: Report):
        self.report = report
        self.graphs: list[tuple[int, int]] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        """What torch.compile asks a backend for."""
        return compile_fx(graph, inputs, inner_compile=self._plan)

    def _plan(self, graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable:
        kept = copy.deepcopy(graph)
        before = len(self.graphs)
        patched = mock.patch.object(GraphLowering, "compile_to_module", self._stop)
        with patched, torch._inductor.config.patch(fx_graph_cache=False):
            try:
                compile_fx_inner(graph, inputs, **settings)
            except Exception as error:  # inductor wraps ours in one of its own
                if len(self.graphs) == before:
                    raise error
        kernels, moved = self.graphs[-1]

        def run(arguments: list[Any]) -> Sequence[Any]:
            given = list(arguments)
            arguments.clear()
            return self.report(kernels, moved, lambda: kept(*given))

        run._boxed_call = True  # AOT autograd's convention: one list, which the callee empties
        return run

    @property
    def _stop(self) -> Callable[[GraphLowering], None]:
        def stop(lowering: GraphLowering) -> None:
            lowering.codegen()
            nodes = [node for node in lowering.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
            self.graphs.append((len(nodes), lowering.count_bytes()[0]))
            raise _Planned

        return stop
