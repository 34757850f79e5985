"""The stages, in one plain dictionary."""

from curate.stages.base import Stage
from curate.stages.decontaminate import Decontaminate
from curate.stages.dedup import Dedup
from curate.stages.download import Download
from curate.stages.embed import Embed
from curate.stages.ingest import Ingest
from curate.stages.remove import Remove
from curate.stages.report import Report
from curate.stages.score import Score
from curate.stages.select import Select
from curate.stages.write import Write

__all__ = ["STAGES"]

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        Download,
        Ingest,
        Remove,
        Embed,
        Decontaminate,
        Dedup,
        Score,
        Select,
        Write,
        Report,
    )
}
