"""A training step as one CUDA graph: the host then launches one graph instead of hundreds of small kernels.

With small networks or small batches a GPU computes a kernel faster than the host can launch the next one. A captured step has
no launches inside, so it takes as long as the device computes (figures: docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Number of first calls that run without a graph. In them libraries choose their algorithms and blocks are compiled."""


class Captured:
    """A function of tensors on a CUDA device that is captured as a graph after the first calls, and then replayed.

    ``function`` takes tensors whose shapes never change and returns one tensor. It may change other tensors in place, such as
    parameters and the state of an optimizer that was made with ``capturable=True``. It must not read a value back to the host
    or draw random numbers, and Python code in it runs for the first calls only. The graph keeps the addresses of the
    tensors that it uses: if one of them is replaced by another, a new instance is needed.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """``function(*inputs)``; the returned tensor is detached and not overwritten by later calls."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._beside(inputs)
        if self._graph is None:
            self._inputs = tuple(tensor.clone() for tensor in inputs)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._function(*self._inputs).detach()
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._output.clone()

    def _beside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Call the function on a stream of its own, as a capture requires of the calls before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = self._function(*inputs).detach()
        torch.cuda.current_stream().wait_stream(stream)
        return found
