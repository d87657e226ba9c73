"""Errors that a user can act on: what is wrong, where it is, what to write instead."""


class MooerError(Exception):
    """Anything this package refuses to do; its message is meant for the user."""


class ConfigError(MooerError, ValueError):
    """A setting that cannot work: unknown key, wrong type, contradicting values."""


class DataError(MooerError, ValueError):
    """A corpus, shard or audio file that cannot be used as it is."""


class CheckpointError(MooerError, ValueError):
    """Weights that are missing, damaged, or do not belong to the model."""


class DeviceError(MooerError, RuntimeError):
    """An accelerator that was asked for and is not usable here."""


class TrainingError(MooerError, RuntimeError):
    """A run that cannot go on: a loss that is not a number, or memory that ran out."""


class DependencyError(MooerError, ImportError):
    """An optional package is not installed; the message names the extra to install."""
