"""The attention kernel that transformers calls for our LLM: torch's SDPA, which also knows packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.packing import Packing

NAME = "mooer_sdpa"


def kernel(name: str) -> str:
    """What transformers is told for ``llm_conf.attention``: ours in place of ``sdpa``, others as they are."""
    if name != "sdpa":
        return name
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_sdpa)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
    return NAME


def packed_arguments(attention: str, packing: Packing) -> dict[str, Any]:
    """Arguments of a transformers model for a packed row.

    Args:
        attention: ``llm_conf.attention``.
        packing: of the row.

    Raises:
        ConfigError: a kernel that would let utterances of a row see each other, or costs the square of its length.
    """
    if attention == "flash_attention_2":  # finds the utterances by itself, where positions begin again
        return {"position_ids": packing.position_ids}
    if attention != "sdpa":
        raise ConfigError(
            f"dataset_conf.packing does not work with llm_conf.attention: {attention}; use sdpa or flash_attention_2"
        )
    # A mask of four dimensions is passed on as it is: none of (S, S) is made, and packed_sdpa looks at none.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.places.device)
    return {"position_ids": packing.position_ids, "attention_mask": no_mask, "packing": packing}


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA; for a packed row, causal inside each utterance.

    Args:
        module: the attention layer.
        query: (B, H, S, d); B is 1 for a packed row.
        key: (B, H', S', d).
        value: (B, H', S', d).
        attention_mask: as transformers made it; not used for a packed row.
        packing: of the row, or None.
        settings: what else transformers tells its kernels.

    Returns:
        (B, S, H, d), and None for the weights that SDPA does not give.
    """
    from transformers import AttentionInterface

    sdpa = AttentionInterface()["sdpa"]
    if packing is None:
        return sdpa(module, query, key, value, attention_mask, **settings)
    out, _ = sdpa(module, packing.spread(query), packing.spread(key), packing.spread(value), None, **settings)
    return packing.gather(out), None
