"""Errors that a user can cause: one family, each message one sentence that says what was expected."""


class KvcompileError(Exception):
    """Base of the family; the command line prints the message alone and exits with status 2."""


class ArtifactError(KvcompileError):
    """A `.kvb` file that cannot be read, checked or written."""


class ModelError(KvcompileError):
    """A model that is unknown, unreachable, of an unsupported kind, or not the one an artifact is for."""


class TargetError(KvcompileError):
    """A memory target that cannot be parsed or met."""


class CalibrationError(KvcompileError):
    """Calibration text that is missing or too short."""


class CacheError(KvcompileError):
    """A cache used in a way that its artifact does not provide for."""


class ExchangeError(KvcompileError):
    """A file of another system that cannot be read, or that an artifact cannot be turned into."""
