"""The whole plugin on one page: every name that this package adds to FunASR's tables, and where its class lives."""

from __future__ import annotations

import importlib

from funasr_mooer.errors import ConfigError

CLASSES = {
    ("model_classes", "MooER"): "mooer.model:MooerModel",
    ("model_classes", "MooerCTC"): "mooer.ctc_model:CTCModel",
    ("model_classes", "U2ppMoE"): "u2pp_moe.model:U2ppMoEModel",
    ("encoder_classes", "MooerParaformerEncoder"): "encoders.paraformer:ParaformerEncoder",
    ("encoder_classes", "MoEConformerEncoder"): "encoders.moe_conformer:MoEConformerEncoder",
    ("encoder_classes", "MoEOnnxEncoder"): "u2pp_moe.onnx_runtime:OnnxEncoder",
    ("adaptor_classes", "MooerLinearAdapter"): "modules.adapter:LinearAdapter",
    ("decoder_classes", "LoRAQwenDecoder"): "mooer.llm:LoRAQwenDecoder",
    ("decoder_classes", "MoETransformerDecoder"): "u2pp_moe.decoder:MoETransformerDecoder",
    ("decoder_classes", "MoEBiTransformerDecoder"): "u2pp_moe.decoder:MoEBiTransformerDecoder",
    ("decoder_classes", "MoEOnnxDecoder"): "u2pp_moe.onnx_runtime:OnnxDecoder",
    ("tokenizer_classes", "MooerTokenizer"): "mooer.tokenizer:MooerTokenizer",
    ("tokenizer_classes", "MooerUnitsTokenizer"): "u2pp_moe.tokenizer:MooerUnitsTokenizer",
    ("dataset_classes", "MooerDataset"): "data.funasr_dataset:MooerDataset",
    ("batch_sampler_classes", "MooerBatchSampler"): "data.funasr_dataset:MooerBatchSampler",
    ("dataloader_classes", "MooerDataloader"): "data.funasr_dataset:MooerDataloader",
}

FUNASRS_OWN = {"encoders.paraformer"}  # modules whose classes are made of FunASR's


def find(table: str, name: str) -> type | None:
    """The class of that name: ours at once; another one from FunASR's tables, whose import takes seconds; else None."""
    if (table, name) in CLASSES:
        module, _, cls = CLASSES[table, name].partition(":")
        if module in FUNASRS_OWN:
            importlib.import_module("funasr")  # first: its import has all classes registered, and asks for this one too
        return getattr(importlib.import_module(f"funasr_mooer.{module}"), cls)
    from funasr.register import tables

    return getattr(tables, table, {}).get(name)


def name_of(table: str, cls: type) -> str:
    """The name under which a class is found; its own where it has none."""
    place = f"{cls.__module__.removeprefix('funasr_mooer.')}:{cls.__qualname__}"
    ours = [name for (of, name), where in CLASSES.items() if of == table and where == place]
    if ours:
        return ours[0]
    from funasr.register import tables

    return next((name for name, known in getattr(tables, table).items() if known is cls), cls.__name__)


def register_all() -> None:
    """Put every class into its table; a second call changes nothing.

    Raises:
        ConfigError: another package has taken one of the names. FunASR itself would replace it without a word.
    """
    from funasr.register import tables

    from funasr_mooer.data.funasr_dataset import MooerDataloader
    from funasr_mooer.mooer.prompt import Prompt

    MooerDataloader.build_prompt = Prompt
    for table, name in CLASSES:
        cls, taken = find(table, name), getattr(tables, table, {}).get(name)
        if taken is not None and taken is not cls:
            raise ConfigError(f"{table} already has '{name}' ({taken.__module__}); two plugins cannot share a name")
        if taken is None:
            tables.register(table, name)(cls)
