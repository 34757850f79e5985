"""Takes the steps of a training: as written, or on a GPU replayed as one graph.

A step of a small CLIP is a thousand operations of microseconds each, which a GPU does in a tenth of
the time that Python takes to hand them over one by one, and several processes that share a GPU take
turns. A graph hands over all of them at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Step", "eager_step", "graphed_step"]

#: Takes a step: what `loss_of` asks for, and the learning rate as a share of its highest. Returns
#: the loss before it, where it was computed.
Step = Callable[[Sequence[Tensor], float], Tensor]
_LossOf = Callable[[Sequence[Tensor]], Tensor]

#: Steps before capture, in which libraries choose and load what they compute by.
_WARM_UPS = 3


def eager_step(optimiser: torch.optim.Optimizer, loss_of: _LossOf) -> Step:
    """Make a step that does one operation after the other.

    Parameters
    ----------
    optimiser : torch.optim.Optimizer
        Over what is trained, at the highest learning rate.
    loss_of : callable
        The loss of a batch, of any tensors that tell which it is.
    """
    highest = [group["lr"] for group in optimiser.param_groups]

    def take(inputs: Sequence[Tensor], rate: float) -> Tensor:
        for group, most in zip(optimiser.param_groups, highest, strict=True):
            group["lr"] = most * rate
        return _take(optimiser, loss_of, inputs)

    return take


def graphed_step(model: nn.Module, optimiser: torch.optim.Optimizer, loss_of: _LossOf) -> Step:
    """Make a step that replays the first one as a CUDA graph.

    Parameters
    ----------
    model : nn.Module
        What is trained, on a GPU.
    optimiser : torch.optim.Optimizer
        Over its parameters, `capturable`, at the highest learning rate; not used yet.
    loss_of : callable
        The loss of a batch, of tensors whose shapes are the same in every step. It draws nothing
        and asks the GPU for nothing.

    Notes
    -----
    Takes inputs on the CPU. The tensor returned belongs to the caller.
    """
    (device,) = {weight.device for weight in model.parameters()}
    highest = [group["lr"] for group in optimiser.param_groups]
    rates = [torch.zeros((), device=device) for _ in highest]
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    held: list[Tensor] = []
    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def take(inputs: Sequence[Tensor], rate: float) -> Tensor:
        if not captured:
            held.extend(given.to(device) for given in inputs)
            captured.append(_capture(model, optimiser, loss_of, held))
        for place, given in zip(held, inputs, strict=True):
            # Not waited for: from memory that stays where it is.
            place.copy_(given.pin_memory(), non_blocking=True)
        for place, most in zip(rates, highest, strict=True):
            place.fill_(most * rate)
        graph, loss = captured[0]
        graph.replay()
        return loss.clone()

    return take


def _capture(
    model: nn.Module, optimiser: torch.optim.Optimizer, loss_of: _LossOf, inputs: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record a step and where it leaves its loss; the model is as before."""
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            _take(optimiser, loss_of, inputs)
    torch.cuda.current_stream().wait_stream(aside)
    # Gradients must lie in the graph's own memory.
    optimiser.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = _take(optimiser, loss_of, inputs)
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(before[name])
        for kept in optimiser.state.values():
            for value in kept.values():
                value.zero_()
    return graph, loss


def _take(optimiser: torch.optim.Optimizer, loss_of: _LossOf, inputs: Sequence[Tensor]) -> Tensor:
    loss = loss_of(inputs)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return loss.detach()
