"""score: how well every pair fits, by proxies that did and did not train on it.

All scores are functions of what the proxies' step commits; a later score needs no new training.
"""

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curate import storage
from curate.memorization.information import score_information
from curate.memorization.mismatch import REAL, RUNGS, Detector, fit_detector
from curate.memorization.rarity import RARE
from curate.schema import select_schema
from curate.stages.base import Room, Stage, Step, Table, one_task, shard_tasks
from curate.stages.score_clips import (
    MEMORIZATION,
    collect_pairs,
    fold_vocabulary,
    summarize_clips,
    train_clip_proxies,
    train_clip_proxy,
    view_shard,
    weigh_company,
    write_memorization,
)
from curate.stages.score_evidence import (
    ALIGNMENT,
    draw_folds,
    gather_shard,
    read_features,
    spread_rows,
)
from curate.stages.score_inputs import commit_phantoms, read_plan, read_samples, score_stage
from curate.stages.score_proxies import fill_bank, project_shard, train_proxy

__all__ = ["Score"]

Array = np.ndarray[Any, Any]

_COLUMNS = (
    *ALIGNMENT,
    "mismatch_probability",
    "mismatch_probability_stderr",
    "rarity",
    "caption_information",
)
_MEMORIZATION_COLUMNS = ("memorization_score", "memorization_score_stderr", "memorization_kind")
#: What only the proxies trained end to end depend on.
_CLIP_FIELDS = ("proxy", "clip_proxies", "clip_epochs", "clip_views")


class Score(Stage):
    """Alignment under in- and out-proxies, probability of mismatch, rarity."""

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 9
    single_threaded: ClassVar[bool] = True

    proxy: Literal["heads", "clip"] = Field(
        "heads",
        description="`heads`: two small heads over the frozen vectors, for mismatch; `clip`: "
        "besides them small CLIPs trained end to end on thumbnails, for memorization",
    )
    proxies: int = Field(
        8, description="number of proxies, even: every two train on complementary halves", ge=2
    )
    epochs: int = Field(6, description="passes of a proxy over its half", ge=0, le=1000)
    clip_proxies: int = Field(
        32,
        description="number of proxies trained end to end, even, as `proxies`; 2 give no error, "
        "and no kind",
        ge=2,
    )
    clip_epochs: int = Field(
        30, description="passes of a proxy trained end to end over its half", ge=1, le=1000
    )
    clip_views: int = Field(
        4, description="crops over which such a proxy's alignment is averaged", ge=1, le=4
    )
    seed: int = Field(0, description="draws halves, references, phantoms, first weights", ge=0)
    min_samples: int = Field(
        500, description="with fewer usable samples all scores are null", ge=20
    )
    max_train_samples: int = Field(
        100_000, description="samples that one proxy trains on at most, in whole clusters", ge=20
    )
    bank_size: int = Field(
        10_000, description="reference samples in which neighbours are looked for", ge=100
    )
    detector_samples: int = Field(
        6_000, description="samples that the mismatch detector is fitted on", ge=100
    )

    @field_validator("proxies", "clip_proxies")
    @classmethod
    def _check_proxies(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"even, as proxies come in complementary pairs; got {value}")
        return value

    def reads(self) -> tuple[str, ...]:
        needed = ("image_emb", "text_emb", "cluster_id", "caption")
        return (*needed, "thumbnail") if self.proxy == "clip" else needed

    def wants(self) -> tuple[str, ...]:
        # The thumbnails are wanted by either kind, so that going over to the other one leaves the
        # fingerprint of what both share.
        return ("clip_score",) if self.proxy == "clip" else ("thumbnail", "clip_score")

    def tables(self) -> tuple[Table, ...]:
        shared = tuple(name for name in self.hashed_fields() if name not in _CLIP_FIELDS)
        return (
            Table("score", _COLUMNS, shared),
            Table(MEMORIZATION, _MEMORIZATION_COLUMNS),
        )

    def imports(self, room: Room) -> tuple[str, ...]:
        return ("curate.models.train_clip" if self.proxy == "clip" else "curate.models.train",)

    def steps(self) -> tuple[Step, ...]:
        pairs, memorized = ("score",), (MEMORIZATION,)
        clips = (
            Step("pairs", collect_pairs, _scored_shards, memorized),
            Step("words", fold_vocabulary, _once_scored, memorized),
            Step("clips", train_clip_proxy, _clip_tasks, memorized, train_clip_proxies),
            Step("views", view_shard, _scored_shards, memorized),
            Step("slopes", weigh_company, _once_scored, memorized),
        )
        return (
            Step("bank", fill_bank, one_task, pairs),
            Step("proxies", train_proxy, _proxy_tasks, pairs),
            Step("project", project_shard, _scored_shards, pairs),
            Step("evidence", gather_shard, _scored_shards, pairs),
            Step("detector", _train_detector, one_task, pairs),
            Step("table", _write_shard, shard_tasks, pairs),
            *(clips if self.proxy == "clip" else ()),
            Step("memorization", write_memorization, shard_tasks, memorized),
        )

    def facts(self, room: Room) -> dict[str, Any]:
        plan = read_plan(room)
        facts: dict[str, Any] = {"usable": plan.usable, "scored": plan.scored}
        if not plan.scored:
            return facts
        records = [
            storage.read_json(room.path("proxies", f"{proxy}.json"))
            for proxy in range(self.proxies)
        ]
        facts["proxies"] = [
            {
                "samples": record["samples"],
                "first_loss": record["losses"][0] if record["losses"] else None,
                "last_loss": record["losses"][-1] if record["losses"] else None,
                "rivals": record["rivals"],
                "retries": record["retries"],
                "diverged": record["diverged"],
                "mask": record["mask"],
            }
            for record in records
        ]
        if self.proxy == "clip":
            facts["clips"] = summarize_clips(room)
        facts["mismatch"] = storage.read_json(room.path("detector.json"))["facts"]
        return facts


def _proxy_tasks(room: Room) -> list[str]:
    return _numbers(room, score_stage(room).proxies)


def _clip_tasks(room: Room) -> list[str]:
    return _numbers(room, score_stage(room).clip_proxies)


def _numbers(room: Room, count: int) -> list[str]:
    return [str(number) for number in range(count)] if read_plan(room).scored else []


def _once_scored(room: Room) -> list[str]:
    return one_task(room) if read_plan(room).scored else []


def _scored_shards(room: Room) -> list[str]:
    return room.shards() if read_plan(room).scored else []


def _train_detector(room: Room, task: str) -> dict[str, float]:
    """Commit `detector.json`: the detector, and how well it tells its own phantoms."""
    if not read_plan(room).scored:
        return {}
    table = pa.concat_tables(
        [storage.read_table(room.path("fit", f"{shard}.parquet")) for shard in room.shards()]
    ).sort_by("order")
    features = read_features(table)
    bits, rungs, rarity = (table[n].to_numpy() for n in ("caption_bits", "rung", "rarity"))
    folds = np.stack([table[name].to_numpy() for name in ("fold_image", "fold_text")], axis=1)
    detector = fit_detector(features, bits, rungs, folds)
    real, rare = rungs == REAL, rarity >= RARE
    facts: dict[str, Any] = {"pairs": int(real.sum()), "phantoms": int((~real).sum())}
    found: dict[str, Any] = {"typical_bits": float(np.median(bits[real]))}
    if detector is not None:
        probability = detector.probabilities(features, bits, folds[:, 0])[0]
        commit_phantoms(room, rungs[~real], probability[~real])
        likely = probability >= 0.5
        facts |= {
            "share": detector.share,
            "share_stderr": detector.share_stderr,
            "phantoms_above_half": {
                rung: _mean(likely[rungs == place]) for place, rung in enumerate(RUNGS)
            },
            "rare_above_half": _mean(likely[real & rare]),
            "common_above_half": _mean(likely[real & ~rare]),
        }
    found |= {"detector": detector.to_json() if detector else None, "facts": facts}
    storage.commit_json(room.path("detector.json"), found)
    return {"samples": len(rungs)} if detector else {"no_phantoms": 1}


def _mean(values: Array) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def _write_shard(room: Room, task: str) -> dict[str, float]:
    """Commit a shard of the table."""
    schema = select_schema(_COLUMNS)
    uids = room.read(task, [])["uid"]
    found: dict[str, Any] = {}
    if read_plan(room).scored:
        evidence = storage.read_table(room.path("evidence", f"{task}.parquet"))
        found = {name: evidence[name] for name in (*ALIGNMENT, "rarity")}
        known = storage.read_json(room.path("detector.json"))
        bits, unique = (
            evidence[name].to_numpy(zero_copy_only=False)
            for name in ("caption_bits", "caption_uniqueness")
        )
        information = score_information(bits, known["typical_bits"], unique)
        found["caption_information"] = pa.array(information, pa.float32(), from_pandas=True)
        if known["detector"] is not None:
            detector, samples = Detector.from_json(known["detector"]), read_samples(room, task)
            rows = np.flatnonzero(evidence["rarity"].is_valid().to_numpy())
            folds = draw_folds(samples.cluster_codes[rows], score_stage(room).seed)
            both = detector.probabilities(read_features(evidence)[rows], bits[rows], folds)
            for name, values in zip(("", "_stderr"), both, strict=True):
                found[f"mismatch_probability{name}"] = spread_rows(values, rows, len(uids))
    columns = [found.get(field.name, pa.nulls(len(uids), field.type)) for field in schema]
    table = pa.table([uids, *columns], names=["uid", *_COLUMNS])
    room.commit_shard("score", task, table)
    return {"samples": len(uids)}
