"""Takes the steps of a training: as written, or on a GPU replayed as one graph.

A step of a small CLIP is six hundred operations of microseconds each, which a GPU does in a tenth
of the time that Python takes to hand them over one by one: a graph hands over all of them at once.
None of them fills the GPU, and processes that share it take turns; several trainings of one process
can share it in streams of their own.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["EagerSteps", "GraphedSteps", "Steps", "finish", "finish_together"]

_Outcome = TypeVar("_Outcome")
_LossOf = Callable[[Sequence[Tensor]], Tensor]

#: Steps before capture, in which libraries choose and load what they compute by.
_WARM_UPS = 3
#: Steps whose inputs a GPU is given at once: a copy costs the same for all of them as for one.
_BLOCK = 16


class Steps(Protocol):
    """Steps of one training."""

    def take(self, inputs: Sequence[Tensor], rate: float) -> None:
        """Take a step.

        Parameters
        ----------
        inputs : sequence of Tensor
            What `loss_of` asks for, on the CPU.
        rate : float
            Learning rate as a share of its highest.
        """

    def total(self) -> float:
        """Return the sum of the losses since this was last asked, each of before its step."""


class EagerSteps:
    """Does one operation after the other.

    Parameters
    ----------
    optimiser : torch.optim.Optimizer
        Over what is trained, at the highest learning rate.
    loss_of : callable
        The loss of a batch, of any tensors that tell which it is.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, loss_of: _LossOf) -> None:
        self._optimiser, self._loss_of = optimiser, loss_of
        self._highest = [group["lr"] for group in optimiser.param_groups]
        self._total = torch.zeros((), dtype=torch.float64)

    def take(self, inputs: Sequence[Tensor], rate: float) -> None:
        """See `Steps`."""
        for group, most in zip(self._optimiser.param_groups, self._highest, strict=True):
            group["lr"] = most * rate
        loss = _take(self._optimiser, self._loss_of, inputs)
        # Left where it is: to ask a GPU for it is to wait until it has done all it was given.
        self._total = self._total.to(loss.device) + loss

    def total(self) -> float:
        """See `Steps`."""
        total, self._total = self._total.item(), torch.zeros((), dtype=torch.float64)
        return total


class GraphedSteps:
    """Replays the first step as a CUDA graph.

    Parameters
    ----------
    model : nn.Module
        What is trained, on a GPU.
    optimiser : torch.optim.Optimizer
        Over its parameters, `capturable`, at the highest learning rate; not used yet.
    loss_of : callable
        The loss of a batch, of tensors whose shapes are the same in every step. It draws nothing
        and asks the GPU for nothing.
    """

    def __init__(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, loss_of: _LossOf
    ) -> None:
        (self._device,) = {weight.device for weight in model.parameters()}
        self._model, self._optimiser, self._loss_of = model, optimiser, loss_of
        self._highest = [group["lr"] for group in optimiser.param_groups]
        for group in optimiser.param_groups:
            group["lr"] = torch.zeros((), device=self._device)
        self._waiting: list[list[Tensor]] = []
        #: Of every step of a block its inputs, and last its rate.
        self._held: list[Tensor] = []
        #: Steps of the block that are still to be taken.
        self._ready = 0
        self._number = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, inputs: Sequence[Tensor], rate: float) -> None:
        """See `Steps`."""
        self._waiting.append([*inputs, torch.tensor(rate)])
        # One of the block before: the GPU has work while this one is put together.
        self._replay(1)
        if len(self._waiting) == _BLOCK:
            self._hand_over()

    def total(self) -> float:
        """See `Steps`."""
        self._replay(_BLOCK)
        self._hand_over()
        self._replay(_BLOCK)
        total = float(self._total.item())
        self._total.zero_()
        return total

    def _replay(self, most: int) -> None:
        for _ in range(min(most, self._ready)):
            self._graph.replay()  # type: ignore[union-attr]  # of what is ready there is one
            self._ready -= 1

    def _hand_over(self) -> None:
        """Make those that wait the next block, once the last one is done."""
        if not self._waiting:
            return
        blocks = [torch.stack(given) for given in zip(*self._waiting, strict=True)]
        if not self._held:
            self._held = [
                torch.zeros((_BLOCK, *block.shape[1:]), dtype=block.dtype, device=self._device)
                for block in blocks
            ]
        for place, block in zip(self._held, blocks, strict=True):
            # Not waited for: from memory that stays where it is.
            place[: len(block)].copy_(block.pin_memory(), non_blocking=True)
        if self._graph is None:
            self._graph = self._capture()
        self._number.zero_()
        self._ready = len(self._waiting)
        self._waiting.clear()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record a step; the model is as before."""
        state = self._model.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        # Of its own: graphs recorded on one stream, as they are by default, share what cuBLAS works
        # in, and spoil each other's products if they are replayed at once (pytorch #193402).
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                self._number.zero_()
                self._take_next()
        torch.cuda.current_stream().wait_stream(aside)
        # Gradients must lie in the graph's own memory.
        self._optimiser.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            self._take_next()
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(before[name])
            for kept in self._optimiser.state.values():
                for value in kept.values():
                    value.zero_()
        self._total.zero_()
        return graph

    def _take_next(self) -> None:
        """Take the block's next step."""
        *inputs, rate = (place.index_select(0, self._number)[0] for place in self._held)
        for group, most in zip(self._optimiser.param_groups, self._highest, strict=True):
            group["lr"].copy_(most * rate)
        self._total.add_(_take(self._optimiser, self._loss_of, inputs))
        self._number.add_(1)


def _take(optimiser: torch.optim.Optimizer, loss_of: _LossOf, inputs: Sequence[Tensor]) -> Tensor:
    loss = loss_of(inputs)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.detach()


def finish(training: Generator[object, None, _Outcome]) -> _Outcome:
    """Take all steps of a training and return its outcome."""
    while True:
        try:
            next(training)
        except StopIteration as end:
            outcome: _Outcome = end.value
            return outcome


def finish_together(
    trainings: Sequence[Generator[object, None, _Outcome]], device: str
) -> list[_Outcome]:
    """Take all steps of several trainings in turns, on a GPU each in a stream of its own.

    Parameters
    ----------
    trainings : sequence of generator
        Each seeds torch's random numbers before it draws any, and yields between steps.
    device : str

    Returns
    -------
    list
        Their outcomes, each as it is alone.
    """
    outcomes: dict[int, _Outcome] = {}
    on_gpu = device == "cuda"
    streams: list[AbstractContextManager[object]] = [
        torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext()  # type: ignore[no-untyped-call]
        for _ in trainings
    ]
    if on_gpu:
        torch.cuda.synchronize()  # they read what was put there on another stream
    drawn = [torch.get_rng_state() for _ in trainings]
    while len(outcomes) < len(trainings):
        for place, training in enumerate(trainings):
            if place in outcomes:
                continue
            # Each draws as if it were alone.
            torch.set_rng_state(drawn[place])
            with streams[place]:
                try:
                    next(training)
                except StopIteration as end:
                    outcomes[place] = end.value
            drawn[place] = torch.get_rng_state()
    if on_gpu:
        torch.cuda.synchronize()  # others use the models on streams of their own
    return [outcomes[place] for place in range(len(trainings))]
