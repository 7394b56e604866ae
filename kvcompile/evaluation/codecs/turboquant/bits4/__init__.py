"""TurboQuant with 4 bits a coordinate."""

from kvcompile.evaluation.codecs.turboquant import turboquant

CODEC = turboquant(4, __name__)
