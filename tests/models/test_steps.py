"""A step is the same whether its operations are handed over one by one or all at once."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from curate.models.steps import EagerSteps, GraphedSteps, Steps

#: Steps before a total is asked for: one, a few, more than are handed over at once.
_COUNTS = (1, 3, 150, 1)


def _model(device: str) -> nn.Module:
    torch.manual_seed(0)
    # Batch norm keeps what it has seen, which warm-up must not add to.
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 1)).to(
        device
    )


def _batches(count: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Rows, what is wanted of them, and a rate."""
    torch.manual_seed(count)
    for number in range(count):
        yield torch.randn(32, 8), torch.randn(32), 0.1 * (number % 4) / count


def _train(device: str, graphed: bool) -> tuple[nn.Module, list[float]]:
    model = _model(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=0.1, fused=True, capturable=device == "cuda"
    )

    def loss_of(inputs: Sequence[Tensor]) -> Tensor:
        rows, wanted = (given.to(device) for given in inputs)
        return ((model(rows)[:, 0] - wanted) ** 2).mean()

    steps: Steps = (
        GraphedSteps(model, optimiser, loss_of) if graphed else EagerSteps(optimiser, loss_of)
    )
    totals = []
    for count in _COUNTS:
        for rows, wanted, rate in _batches(count):
            steps.take((rows, wanted), rate)
        totals.append(steps.total())
    return model, totals


def test_a_step_takes_the_rate_it_is_told_and_its_loss_counts_once() -> None:
    model, totals = _train("cpu", graphed=False)
    again = _model("cpu")
    optimiser = torch.optim.AdamW(again.parameters(), lr=0.1)
    for count, told in zip(_COUNTS, totals, strict=True):
        total = 0.0
        for rows, wanted, rate in _batches(count):
            optimiser.param_groups[0]["lr"] = 0.1 * rate
            loss = ((again(rows)[:, 0] - wanted) ** 2).mean()
            total += loss.item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert total == pytest.approx(told, rel=1e-4)
    _check_equal(model, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_would_do_step_by_step() -> None:
    model, totals = _train("cuda", graphed=True)
    other, expected = _train("cuda", graphed=False)
    assert totals == pytest.approx(expected, rel=1e-4)
    _check_equal(model, other)


def _check_equal(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)
