"""Quality after compression: text that goes on, quotes and questions, at equal bytes for every method."""

from kvcompile.evaluation.caches import Contender
from kvcompile.evaluation.held_out import evaluation_families
from kvcompile.evaluation.methods import METHODS, contenders
from kvcompile.evaluation.participant import Held, Participant
from kvcompile.evaluation.run import Row, evaluate
from kvcompile.evaluation.summary import Summary, summarise

__all__ = [
    "METHODS",
    "Contender",
    "Held",
    "Participant",
    "Row",
    "Summary",
    "contenders",
    "evaluate",
    "evaluation_families",
    "summarise",
]
