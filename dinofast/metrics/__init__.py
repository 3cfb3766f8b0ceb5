"""How well scores rank abnormal above normal: exact, and streamed with a proven bound."""

from dinofast.metrics.ranking import aupr, auroc, average_precision
from dinofast.metrics.streamed import Bounded, StreamedRanking

__all__ = ["Bounded", "StreamedRanking", "aupr", "auroc", "average_precision"]
