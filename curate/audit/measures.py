"""What a model memorized of a panel: embeddings in, measures out; nothing is read or trained.

Everything is a difference of differences: how much better candidates fit than held-out pairs do,
under the model, minus the same under a reference that did not see the candidates. Without a
reference the second part is nothing, and easy candidates count as memorized: held-out pairs of the
same distribution are what that is measured against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu, norm, t

from curate.errors import InputError
from curate.memorization import checks
from curate.memorization.metrics import clipmem, cmc, multimem
from curate.memorization.protocol import sign_test, summarize_set
from curate.memorization.verdict import tell_kinds

__all__ = ["FEW_CLUSTERS", "Embeddings", "Estimate", "Measures", "estimate", "measure"]

Array = np.ndarray[Any, Any]

#: Below so many clusters of candidates, or held-out pairs, an interval is a guess.
FEW_CLUSTERS = 30
#: Of the interval.
_CONFIDENCE = 0.95
#: A reference that tells candidates from held-out pairs this surely has seen them.
_SURE = 0.01


@dataclass(frozen=True)
class Embeddings:
    """What one model makes of a panel.

    Parameters
    ----------
    candidates : mapping of str to (N, D) or (K, N, D) floating, unit norm
        By modality, two or more, the same samples in the same order; K views, see
        `curate.memorization.metrics`.
    held_out : mapping of str to (M, D) or (K, M, D) floating, unit norm
        The same modalities of samples that the model did not train on, of the same distribution.

    Raises
    ------
    InputError
        If modalities, samples or widths do not fit, rows are not finite or not of unit norm, or
        there are fewer than two samples of either.
    """

    candidates: Mapping[str, Array]
    held_out: Mapping[str, Array]

    def __post_init__(self) -> None:
        names = list(self.candidates)
        if sorted(names) != sorted(self.held_out):
            raise InputError(
                f"held-out: must hold the modalities {', '.join(names)} of the candidates; got "
                f"{', '.join(self.held_out) or 'none'}. Embed both alike."
            )
        both = (("candidates", self.candidates), ("held-out", self.held_out))
        wanted = np.shape(self.candidates[names[0]])[-1] if names else 0
        for where, given in both:
            for name in names:
                width = np.shape(given[name])[-1]
                if width != wanted:
                    raise InputError(
                        f"{where} {name}: must be {wanted} numbers wide, as candidates "
                        f"{names[0]}; got {width}. Embed all with one model whose towers share a "
                        "space."
                    )
        for where, given in both:
            try:
                arrays = checks.modalities(where, [given[name] for name in names])
            except ValueError as error:
                why = _named(str(error), names)
                raise InputError(f"{why}. Embed all with one model.") from error
            if arrays[0].shape[1] < 2:
                raise InputError(
                    f"{where}: must be at least 2 samples, for an interval; got "
                    f"{arrays[0].shape[1]}. Name more."
                )

    @property
    def modalities(self) -> list[str]:
        """Names, in the order of `candidates`."""
        return list(self.candidates)

    def arrays(self) -> tuple[list[Array], list[Array]]:
        """Candidates and held-out samples, each in the order of `modalities`."""
        return list(self.candidates.values()), [self.held_out[name] for name in self.candidates]


def _named(message: str, names: list[str]) -> str:
    """Say modalities by name, not by number."""
    for place, name in enumerate(names):
        message = message.replace(f"[{place}]", f" {name}")
    return message


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Parameters
    ----------
    samples, clusters : int
    mean, stderr : float
        Standard error over clusters, that of the held-out mean included where one is taken off.
    low, high : float
        95 % interval, by Student's t. It is about samples: that the two models are only one pair
        of trainings is not in it.
    share_positive, p_value : float, [0, 1]
        Sign test over clusters.
    """

    samples: int
    clusters: int
    mean: float
    stderr: float
    low: float
    high: float
    share_positive: float
    p_value: float


def estimate(
    values: Array, clusters: Array, baseline: Array | None = None, shared: float = 0.0
) -> Estimate | None:
    """Estimate the mean of values, beyond that of a baseline; None below two clusters.

    Parameters
    ----------
    values : (N,) floating
        NaN where unknown: left out.
    clusters : (N,) int or str
    baseline : (M,) floating, optional
        Its mean is taken off the mean, its median before the sign test, whose p-value allows for
        the median's own error.
    shared : float
        Standard error that all values have in common, which no number of them makes smaller. The
        p-value is then that of the mean's t, if it is higher.

    References
    ----------
    Mathisen, A Method of Testing the Hypothesis that Two Samples are from the Same Population,
    Annals of Mathematical Statistics 14 (1943): signs against a control's median.
    """
    known = np.isfinite(values)
    if len(np.unique(clusters[known])) < 2:
        return None
    found = summarize_set("values", values[known], clusters[known])
    mean, error, freedom = found.mean, found.stderr, found.clusters - 1
    share, p_value = found.share_positive, found.p_value
    if baseline is not None:
        mean -= float(baseline.mean())
        error = float(np.hypot(error, baseline.std(ddof=1) / np.sqrt(len(baseline))))
        freedom = min(freedom, len(baseline) - 1)
        ids, sizes = np.unique(clusters[known], return_inverse=True, return_counts=True)[1:]
        signs = sign_test(np.bincount(ids, values[known]) / sizes - np.median(baseline))
        share = signs.share_positive
        spread = 0.5 * np.sqrt(1 / max(signs.count, 1) + 1 / len(baseline))
        p_value = float(2 * norm.sf(abs(share - 0.5) / spread))
    if shared:
        error = float(np.hypot(error, shared))
        p_value = max(p_value, float(2 * t.sf(abs(mean) / error, freedom)))
    within = float(t.ppf((1 + _CONFIDENCE) / 2, freedom)) * error
    return Estimate(
        found.samples, found.clusters, mean, error, mean - within, mean + within, share, p_value
    )


@dataclass(frozen=True)
class Measures:
    """What `measure` found.

    Parameters
    ----------
    scores : dict of str to (N,) float64
        Of every candidate: `memorization`, `alignment` (`cmc` under the model), `p_value` (share
        of held-out pairs that do at least as well as the candidate, for `memorization`); with a
        reference `alignment_reference` and `multimem`, for two modalities `clipmem`.
    held_out : (M,) float64
        `memorization` of held-out samples, with mean 0.
    memorized : (N,) bool
        Beyond two standard deviations of the held-out samples, and by half of the
        alignment beyond unrelated parts.
    estimates : dict of str to Estimate
        Means of `memorization`; with a reference of `multimem`, its two other forms, `clipmem`,
        and `multimem_held_out`.
    auc, auc_p_value : float
        Probability that a candidate's memorization exceeds a held-out sample's, and that of as
        much by chance (Mann-Whitney).
    warnings : list of str
    """

    scores: dict[str, Array]
    held_out: Array
    memorized: Array
    estimates: dict[str, Estimate]
    auc: float
    auc_p_value: float
    warnings: list[str] = field(default_factory=list)

    def split(self, clusters: Array, parts: Mapping[str, Array]) -> dict[str, Any]:
        """Estimate memorization within parts of the candidates.

        Parameters
        ----------
        clusters : (N,) int or str
        parts : mapping of str to (N,) bool

        Returns
        -------
        dict
            By part: `samples`, `memorized` (share) and, from two clusters on, `memorization`.
        """
        found: dict[str, Any] = {}
        for name, rows in parts.items():
            values = self.scores["memorization"][rows]
            mean = estimate(values, clusters[rows], self.held_out) if len(values) else None
            found[name] = {
                "samples": int(rows.sum()),
                "memorized": float(self.memorized[rows].mean()) if rows.any() else None,
                "memorization": mean and asdict(mean),
            }
        return found


def measure(
    model: Embeddings, reference: Embeddings | None = None, clusters: Sequence[str] | None = None
) -> Measures:
    """Measure what a model memorized of the candidates.

    Parameters
    ----------
    model, reference : Embeddings
        Of the model, and of one that did not train on the candidates; of the same samples and
        modalities. Widths may differ.
    clusters : sequence of str, length N, optional
        Duplicate cluster of each candidate; default: all are independent.

    Returns
    -------
    Measures

    Raises
    ------
    InputError
        If the two models hold other samples or modalities.

    References
    ----------
    Wang et al., MultiMem (arXiv:2606.22220) and CLIPMem (arXiv:2502.07830). The variant without a
    reference is a membership test by alignment, calibrated on held-out pairs.
    """
    own, held = model.arrays()
    alignment, held_alignment = cmc(own, held), _leave_one_out(held)
    number = len(alignment)
    ids = np.arange(number) if clusters is None else np.asarray(clusters, np.str_)
    if len(ids) != number:
        raise InputError(f"clusters: must name that of {number} candidates; got {len(ids)}.")
    scores = {"alignment": alignment}
    gain, held_gain = alignment, held_alignment
    estimates: dict[str, Estimate] = {}
    warnings = _small_panel(len(np.unique(ids)), len(held_alignment))
    if reference is not None:
        _check_alike(model, reference)
        other = [reference.candidates[name] for name in model.modalities]
        other_held = [reference.held_out[name] for name in model.modalities]
        scores["alignment_reference"] = cmc(other, other_held)
        held_reference = _leave_one_out(other_held)
        gain, held_gain = alignment - scores["alignment_reference"], held_alignment - held_reference
        forms: dict[str, Array] = {
            ("multimem" if form == "raw" else f"multimem_{form}"): multimem(
                own, other, held, other_held, form
            )
            for form in ("raw", "pair_mean", "per_modality")
        }
        scores["multimem"] = forms["multimem"]
        if len(own) == 2:
            first, second = (own[0], own[1]), (other[0], other[1])
            rest, rest_other = (held[0], held[1]), (other_held[0], other_held[1])
            forms["clipmem"] = scores["clipmem"] = clipmem(first, second, rest, rest_other)
        errors = _held_out_errors([(own, held), (other, other_held)])
        for name, values in forms.items():
            estimates[name] = _must(estimate(values, ids, shared=errors[name]), name)
        everyone = np.arange(len(held_gain))
        estimates["multimem_held_out"] = _must(estimate(held_gain, everyone), "held-out")
        warnings += _seen_by_reference(
            scores["alignment_reference"], held_reference, ids, estimates["multimem"]
        )
    middle = float(held_gain.mean())
    scores = {"memorization": gain - middle, **scores}
    held_scores = held_gain - middle
    exceeded = np.searchsorted(np.sort(held_gain), gain, side="left")
    scores["p_value"] = (1 + len(held_gain) - exceeded) / (1 + len(held_gain))
    estimates = {
        "memorization": _must(estimate(scores["memorization"], ids, held_scores), "candidates"),
        **estimates,
    }
    spread = np.full(number, held_scores.std(ddof=1))
    # `tell_kinds` knows unrelated parts of two modalities, whose coherence is 1; of n it is n / 2.
    coherence = alignment - len(own) / 2 + 1
    kinds = tell_kinds(scores["memorization"], spread, coherence, np.zeros(number))
    memorized = np.array([kind == "beneficial" for kind in kinds])
    auc, p_value = _compare(gain, held_gain, ids)
    return Measures(scores, held_scores, memorized, estimates, auc, p_value, warnings)


def _must(found: Estimate | None, where: str) -> Estimate:
    if found is None:
        raise InputError(
            f"{where}: must be of at least 2 duplicate clusters, for an interval; got 1. Name more."
        )
    return found


def _leave_one_out(held_out: list[Array]) -> Array:
    """Coherence of held-out samples against the others of them: (M,) float64.

    With itself among those that it is compared with, a held-out sample would fit worse than a
    candidate by up to 1 / M.
    """
    arrays = checks.modalities("held-out", held_out)
    count = arrays[0].shape[1]
    total = np.zeros(arrays[0].shape[1:])
    own = np.zeros(count)
    for rows, block in checks.blocks(arrays):
        both = sum(block, start=np.zeros(1))
        total[rows] = both.mean(0)
        own[rows] = np.einsum("kbd,kbd->kb", both, both).mean(0)
    others = (total.sum(0) - total) / (count - 1)
    result: Array = (own - np.einsum("md,md->m", total, others)) / 2
    return result


def _check_alike(model: Embeddings, reference: Embeddings) -> None:
    def sizes(one: Embeddings) -> tuple[list[str], int, int]:
        own, held = one.arrays()
        return sorted(one.modalities), np.shape(own[0])[-2], np.shape(held[0])[-2]

    wanted, got = sizes(model), sizes(reference)
    if wanted != got:
        raise InputError(
            f"reference: must hold {', '.join(wanted[0])} of the model's {wanted[1]} candidates "
            f"and {wanted[2]} held-out samples; got {', '.join(got[0])} of {got[1]} and {got[2]}. "
            "Embed the same samples with both."
        )


def _small_panel(clusters: int, held_out: int) -> list[str]:
    return [
        f"{number} {what}: too few for the interval to be trusted; {FEW_CLUSTERS} are the least"
        for number, what in ((clusters, "clusters of candidates"), (held_out, "held-out samples"))
        if number < FEW_CLUSTERS
    ]


def _held_out_errors(models: Sequence[tuple[list[Array], list[Array]]]) -> dict[str, float]:
    """Standard errors of means by form: what another draw of held-out samples would change.

    All candidates are compared with the same held-out mean, whose error more of them do not
    average out. `models` are candidates and held-out samples under the model and the reference.
    """
    number = len(models[0][0])
    whole, crossed = [], []
    for own, held in models:
        middles = [part.reshape(-1, part.shape[-1]).mean(0, dtype=np.float64) for part in own]
        rows = [part if part.ndim == 2 else part.mean(0) for part in held]
        every = sum(rows, start=np.zeros(1)) @ sum(middles, start=np.zeros(1))
        whole.append(every)
        crossed.append(every - sum(row @ middle for row, middle in zip(rows, middles, strict=True)))

    def error(both: list[Array]) -> float:
        difference = both[0] - both[1]
        return float(difference.std(ddof=1) / np.sqrt(len(difference)))

    raw = error(whole) / 2
    return {
        "multimem": raw,
        "multimem_pair_mean": raw / (number * (number - 1) / 2),
        "multimem_per_modality": raw / (number - 1),
        "clipmem": error(crossed),
    }


def _compare(values: Array, others: Array, clusters: Array) -> tuple[float, float]:
    """Probability that a value exceeds another, ties half, and of as much by chance.

    The latter over means of clusters, as copies are not independent.
    """
    found = mannwhitneyu(values, others, alternative="two-sided", method="asymptotic")
    ids, sizes = np.unique(clusters, return_inverse=True, return_counts=True)[1:]
    means = np.bincount(ids, values) / sizes
    by_chance = mannwhitneyu(means, others, alternative="two-sided", method="asymptotic")
    return float(found.statistic / (len(values) * len(others))), float(by_chance.pvalue)


def _seen_by_reference(
    own: Array, held_out: Array, clusters: Array, difference: Estimate
) -> list[str]:
    """Tell if the reference itself fits candidates better than held-out samples."""
    auc, p_value = _compare(own, held_out, clusters)
    if auc <= 0.5 or p_value >= _SURE:
        return []
    return [
        f"the reference fits the candidates better than the held-out samples (AUC {auc:.2f}, "
        f"p {p_value:.1g}), and the model fits {difference.share_positive:.0%} of them better than "
        f"the reference does (sign test, p {difference.p_value:.1g}): it has probably seen them, "
        "and what both memorized is not counted. Give a reference that has not, or none"
    ]
