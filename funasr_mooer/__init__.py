"""MooER and U2++ MoE for FunASR; importing this package registers their classes with FunASR."""

from __future__ import annotations

from typing import Any

from funasr_mooer.plugin import register_with_funasr

__version__ = "0.1.0"

__all__ = ["AutoModel", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "AutoModel":
        from funasr_mooer.auto import AutoModel

        return AutoModel
    if name == "load_model":
        from funasr_mooer.border.build import load_model

        return load_model
    raise AttributeError(f"module 'funasr_mooer' has no attribute '{name}'")


register_with_funasr()
