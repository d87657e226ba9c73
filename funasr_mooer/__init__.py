"""MooER and U2++ MoE for FunASR; importing this package registers their classes with FunASR."""

__version__ = "0.1.0"
