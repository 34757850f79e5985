"""A step is the same whether its operations are handed over one by one or all at once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from curate.models.steps import Step, eager_step, graphed_step

_RATES = (0.5, 1.0, 0.25, 0.0)


def _model(device: str) -> nn.Module:
    torch.manual_seed(0)
    # Batch norm keeps what it has seen, which warm-up must not add to.
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 1)).to(
        device
    )


def _train(device: str, graphed: bool) -> tuple[nn.Module, list[float]]:
    model = _model(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=0.1, fused=True, capturable=device == "cuda"
    )

    def loss_of(inputs: Sequence[Tensor]) -> Tensor:
        rows, wanted = (given.to(device) for given in inputs)
        return ((model(rows)[:, 0] - wanted) ** 2).mean()

    step: Step
    step = graphed_step(model, optimiser, loss_of) if graphed else eager_step(optimiser, loss_of)
    torch.manual_seed(1)
    batches = [(torch.randn(32, 8), torch.randn(32)) for _ in _RATES]
    return model, [step(batch, rate).item() for batch, rate in zip(batches, _RATES, strict=True)]


def test_a_step_takes_the_rate_it_is_told() -> None:
    model, losses = _train("cpu", graphed=False)
    again = _model("cpu")
    optimiser = torch.optim.AdamW(again.parameters(), lr=0.1)
    torch.manual_seed(1)
    for rate, told in zip(_RATES, losses, strict=True):
        optimiser.param_groups[0]["lr"] = 0.1 * rate
        rows, wanted = torch.randn(32, 8), torch.randn(32)
        loss = ((again(rows)[:, 0] - wanted) ** 2).mean()
        assert loss.item() == pytest.approx(told, rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    _check_equal(model, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_would_do_step_by_step() -> None:
    model, losses = _train("cuda", graphed=True)
    other, expected = _train("cuda", graphed=False)
    assert losses == pytest.approx(expected, rel=1e-4)
    _check_equal(model, other)


def _check_equal(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)
