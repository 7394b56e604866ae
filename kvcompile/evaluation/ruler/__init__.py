"""RULER (arXiv 2404.06654): synthetic tasks of any length, asked of a compressed cache.

The samples are written here after the paper's description, with RULER's templates and settings, and with words and
essays of our own, so scores are to be compared with those of the full cache beside them and not with published ones.
"""

from kvcompile.evaluation.ruler.draw import draw_samples
from kvcompile.evaluation.ruler.haystack import essay_documents
from kvcompile.evaluation.ruler.run import Answered, answer
from kvcompile.evaluation.ruler.sample import Sample, Task, Text
from kvcompile.evaluation.ruler.summary import Scores, summarise_scores
from kvcompile.evaluation.ruler.tasks import ALL, TASKS, named, register

__all__ = [
    "ALL", "TASKS", "Answered", "Sample", "Scores", "Task", "Text", "answer", "draw_samples", "essay_documents",
    "named", "register", "summarise_scores",
]  # fmt: skip
