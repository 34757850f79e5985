"""Measures a fixed panel while a model trains, for a bounded share of the time."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn

from curate.audit.measures import Embeddings, measure
from curate.audit.models import embed
from curate.errors import ConfigError, InputError

__all__ = ["Monitor"]

_log = logging.getLogger(__name__)

#: What a measurement is expected to cost, in times of the dearest so far: machines stutter.
_CAUTION = 1.25
#: Steps before two batches are timed: a forward pass takes less than a step, so two in so many
#: steps are within any share from a hundredth on.
_FIRST_STEPS = 200
#: Methods that two-tower models of open_clip and of transformers embed by.
_METHODS = (("encode_image", "encode_text"), ("get_image_features", "get_text_features"))


class Monitor:
    """Measure memorization of a fixed panel every so many steps of any PyTorch loop.

    The interval follows from what was timed: a measurement is made only when it, and all before
    it, fit into `share` of the time since the monitor was made. Training is left as it is: the
    panel is embedded without gradients and in evaluation mode, and random states are put back. A
    panel that cannot be measured, say because the model gave NaN, is a warning. Of several ranks
    step it on one alone; Hugging Face's callback goes to all of them. Give it the module itself and
    not its DistributedDataParallel; sharded models are not supported.

    Parameters
    ----------
    model : nn.Module
    candidates, held_out : mapping of str to tensor
        By modality, what the encoders take, (N, ...) and (M, ...): pairs that are trained on, and
        pairs like them that are not. Some 256 of each tell a mean to a few hundredths.
    encoders : mapping of str to callable, optional
        By modality; default: `image` and `text` by the methods of open_clip's or transformers'
        two-tower models.
    reference : Embeddings, optional
        Of a model that has not seen the candidates; before a fine-tuning `monitor.embed()`.
    share : float
        Of the time, at most; in (0, 1].
    every : int
        Steps between two measurements at least.
    batch : int
        Panel samples per forward pass; not above that of the training.
    max_memorization : float, optional
        `exceeded` turns true above this mean.
    report : callable, optional
        Is given each record, for a logger.

    Attributes
    ----------
    history : list of dict
        `step`, `memorization`, `low`, `high`, `p_value`, `auc`, `memorized` (share), `seconds`.
    spent_share : float
        Of the time since the monitor was made, what it took so far.

    Raises
    ------
    ConfigError
        If a parameter does not hold, or the model has no methods known.

    Examples
    --------
    >>> monitor = Monitor(model, candidates, held_out)  # doctest: +SKIP
    >>> monitor.attach(optimizer)  # any loop, open_clip's train_one_epoch too  # doctest: +SKIP
    >>> trainer.add_callback(monitor.callback())  # Hugging Face  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, Any],
        held_out: Mapping[str, Any],
        *,
        encoders: Mapping[str, Callable[[Any], Any]] | None = None,
        reference: Embeddings | None = None,
        share: float = 0.01,
        every: int = 1,
        batch: int = 64,
        max_memorization: float | None = None,
        report: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"Monitor: share must be in (0, 1]; got {share}. Write e.g. 0.01.")
        if not (isinstance(every, int) and isinstance(batch, int) and every >= 1 and batch >= 1):
            raise ConfigError(
                f"Monitor: every and batch must be whole, at least 1; got {every}, {batch}."
            )
        if max_memorization is not None and not math.isfinite(max_memorization):
            raise ConfigError(
                f"Monitor: max_memorization must be finite; got {max_memorization}. Leave it out "
                "for no limit."
            )
        self._model, self._encoders = model, dict(encoders or _find_encoders(model))
        self._candidates = _check_panel("candidates", candidates, self._encoders)
        self._held_out = _check_panel("held_out", held_out, self._encoders)
        _check_reference(reference, self._candidates, self._held_out)
        self._reference, self._share, self._every, self._batch = reference, share, every, batch
        self._max, self._report = max_memorization, report
        self._steps = self._last = self._first = 0
        self._begun = time.perf_counter()
        self._spent, self._expected = 0.0, float("nan")
        self.history: list[dict[str, float]] = []
        self.exceeded = False

    @property
    def spent_share(self) -> float:
        """Share of the time since the monitor was made that it took."""
        return self._spent / max(time.perf_counter() - self._begun, 1e-9)

    def step(self) -> dict[str, float] | None:
        """Count a step of the training; measure if that is due, and return the record then."""
        self._steps += 1
        if self._steps - self._last < self._every:
            return None
        if self._expected != self._expected:  # not known yet
            if self._steps - self._first >= _FIRST_STEPS:
                self._time_batch()
            return None
        elapsed = time.perf_counter() - self._begun
        if self._spent + _CAUTION * self._expected > self._share * elapsed:
            return None
        try:
            return self.measure()
        except InputError as error:
            _log.warning("step %d: not measured; %s", self._steps, error)
            self._last = self._steps
            return None

    def start_at(self, step: int) -> None:
        """Number the steps from here on from `step`, that of a training that goes on."""
        self._steps = self._last = self._first = step

    def measure(self) -> dict[str, float]:
        """Measure now, due or not; the time counts as spent."""
        with self._timed() as timed:
            found = measure(self.embed(), self._reference)
        self._last = self._steps
        first = self._expected != self._expected
        self._expected = timed[0] if first else max(self._expected * 0.9, timed[0])
        mean = found.estimates["memorization"]
        record = {
            "step": float(self._steps),
            "memorization": mean.mean,
            "low": mean.low,
            "high": mean.high,
            "p_value": mean.p_value,
            "auc": found.auc,
            "memorized": float(found.memorized.mean()),
            "seconds": timed[0],
        }
        self.history.append(record)
        self.exceeded = self._max is not None and mean.mean > self._max
        if self.exceeded:
            _log.warning(
                "step %d: memorization %.4f is above %g", self._steps, mean.mean, self._max
            )
        if self._report is not None:
            self._report(record)
        return record

    def embed(self) -> Embeddings:
        """Embed the panel with the model as it is."""
        with self._apart():
            calls = {name: self._on_device(call) for name, call in self._encoders.items()}
            return embed(calls, self._candidates, self._held_out, self._batch)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call `step` after each of the optimizer's; return what `remove()` undoes it with."""
        return optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.step()

    def callback(self) -> Any:
        """Return a callback for Hugging Face's Trainer, to be added on every rank.

        The first rank measures, and its records go to `state.log_history`; all ranks stop once
        `max_memorization` is exceeded.
        """
        from transformers import TrainerCallback

        monitor = self

        class MonitorCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                monitor.start_at(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                record = monitor.step() if state.is_world_process_zero else None
                if record is not None:
                    told = {f"audit/{name}": value for name, value in record.items()}
                    state.log_history.append({**told, "step": state.global_step})
                if monitor._is_exceeded_anywhere():
                    control.should_training_stop = True
                return control

        return MonitorCallback()

    def _is_exceeded_anywhere(self) -> bool:
        """Tell all ranks what the first one found: one that stops alone leaves others waiting."""
        alone = not (distributed.is_available() and distributed.is_initialized())
        if alone or self._max is None:
            return self.exceeded
        found = torch.tensor([int(self.exceeded)], device=self._device())
        distributed.broadcast(found, 0)
        return bool(found.item())

    def _time_batch(self) -> None:
        """Expect the whole panel to cost what one batch of it does, times their number."""
        # The first may compile, or load what a library puts off.
        for _ in range(2):
            with self._timed() as timed, self._apart():
                for name, call in self._encoders.items():
                    self._on_device(call)(self._candidates[name][: self._batch])
        panels = (self._candidates, self._held_out)
        batches = sum(-(-len(next(iter(one.values()))) // self._batch) for one in panels)
        self._expected = timed[0] * batches

    @contextlib.contextmanager
    def _timed(self) -> Iterator[list[float]]:
        """Add the block's seconds to those spent, and put them into the list yielded."""
        seconds: list[float] = []
        self._synchronize()
        begun = time.perf_counter()
        try:
            yield seconds
            self._synchronize()
        finally:
            seconds.append(time.perf_counter() - begun)
            self._spent += seconds[0]

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Leave no trace: modes of all modules and random states are put back."""
        modes = [(module, module.training) for module in self._model.modules()]
        device = self._device()
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            self._model.eval()
            try:
                yield
            finally:
                for module, mode in modes:
                    module.training = mode

    def _on_device(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        device = self._device()

        def run(items: Any) -> Any:
            found = call(items.to(device) if isinstance(items, torch.Tensor) else items)
            # transformers returns outputs, of which the pooled one is the embedding.
            return getattr(found, "pooler_output", found)

        return run

    def _device(self) -> torch.device:
        held = next(self._model.parameters(), None)
        return torch.device("cpu") if held is None else held.device

    def _synchronize(self) -> None:
        if self._device().type == "cuda":
            torch.cuda.synchronize()


def _find_encoders(model: nn.Module) -> dict[str, Callable[[Any], Any]]:
    for image, text in _METHODS:
        if hasattr(model, image) and hasattr(model, text):
            return {"image": getattr(model, image), "text": getattr(model, text)}
    raise ConfigError(
        f"Monitor: model must have encode_image and encode_text, or get_image_features and "
        f"get_text_features; {type(model).__name__} has not. Give encoders={{...}}."
    )


def _check_panel(what: str, panel: Any, encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse at once what would end a training at its first measurement."""
    wanted = f"Monitor: {what} must map {', '.join(encoders)} to as many items, at least two"
    if not isinstance(panel, Mapping):
        raise ConfigError(f"{wanted}; got {type(panel).__name__}. Give a dict.")
    lacking = [name for name in encoders if name not in panel]
    if lacking:
        raise ConfigError(f"{wanted}; {', '.join(lacking)} is missing. Add it.")
    try:
        counts = {name: len(panel[name]) for name in encoders}
    except TypeError as error:
        raise ConfigError(f"{wanted}; {error}. Give tensors or lists.") from error
    if len({*counts.values()}) > 1 or min(counts.values()) < 2:
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ConfigError(f"{wanted}; got {told}. Give whole pairs.")
    return {name: panel[name] for name in encoders}


def _check_reference(
    reference: Any, candidates: Mapping[str, Any], held_out: Mapping[str, Any]
) -> None:
    if reference is None:
        return
    if not isinstance(reference, Embeddings):
        raise ConfigError(
            f"Monitor: reference must be Embeddings; got {type(reference).__name__}. Give what "
            "`embed()` returned before the training."
        )
    counts = [len(next(iter(panel.values()))) for panel in (candidates, held_out)]
    both = (reference.candidates, reference.held_out)
    known = [next(iter(panel.values())).shape[-2] for panel in both]
    if counts != known:
        raise ConfigError(
            f"Monitor: reference must be of this panel, {counts[0]} candidates and {counts[1]} "
            f"held-out pairs; got {known[0]} and {known[1]}. Embed it anew."
        )
