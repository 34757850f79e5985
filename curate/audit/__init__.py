"""What a trained model memorized, and whether it is getting worse while it trains."""

from curate.audit.measures import Embeddings, Estimate, Measures, measure
from curate.audit.models import embed
from curate.audit.monitor import Monitor

__all__ = ["Embeddings", "Estimate", "Measures", "Monitor", "embed", "measure"]
