"""TurboQuant with 3 bits a coordinate."""

from kvcompile.evaluation.codecs.turboquant import turboquant

CODEC = turboquant(3, __name__)
