"""The whole plugin on one page: every name that this package adds to FunASR's tables."""

from __future__ import annotations

from funasr.register import tables

from funasr_mooer.data.funasr_dataset import MooerBatchSampler, MooerDataloader, MooerDataset
from funasr_mooer.encoders.moe_conformer import MoEConformerEncoder
from funasr_mooer.encoders.paraformer import ParaformerEncoder
from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.adapter import LinearAdapter
from funasr_mooer.mooer.ctc_model import CTCModel
from funasr_mooer.mooer.llm import LoRAQwenDecoder
from funasr_mooer.mooer.model import MooerModel
from funasr_mooer.mooer.prompt import Prompt
from funasr_mooer.mooer.tokenizer import MooerTokenizer
from funasr_mooer.u2pp_moe.decoder import MoEBiTransformerDecoder, MoETransformerDecoder
from funasr_mooer.u2pp_moe.model import U2ppMoEModel
from funasr_mooer.u2pp_moe.onnx_runtime import OnnxDecoder, OnnxEncoder
from funasr_mooer.u2pp_moe.tokenizer import MooerUnitsTokenizer

CLASSES = {
    ("model_classes", "MooER"): MooerModel,
    ("model_classes", "MooerCTC"): CTCModel,
    ("model_classes", "U2ppMoE"): U2ppMoEModel,
    ("encoder_classes", "MooerParaformerEncoder"): ParaformerEncoder,
    ("encoder_classes", "MoEConformerEncoder"): MoEConformerEncoder,
    ("encoder_classes", "MoEOnnxEncoder"): OnnxEncoder,
    ("adaptor_classes", "MooerLinearAdapter"): LinearAdapter,
    ("decoder_classes", "LoRAQwenDecoder"): LoRAQwenDecoder,
    ("decoder_classes", "MoETransformerDecoder"): MoETransformerDecoder,
    ("decoder_classes", "MoEBiTransformerDecoder"): MoEBiTransformerDecoder,
    ("decoder_classes", "MoEOnnxDecoder"): OnnxDecoder,
    ("tokenizer_classes", "MooerTokenizer"): MooerTokenizer,
    ("tokenizer_classes", "MooerUnitsTokenizer"): MooerUnitsTokenizer,
    ("dataset_classes", "MooerDataset"): MooerDataset,
    ("batch_sampler_classes", "MooerBatchSampler"): MooerBatchSampler,
    ("dataloader_classes", "MooerDataloader"): MooerDataloader,
}


def register_all() -> None:
    """Put every class into its table; a second call changes nothing.

    Raises:
        ConfigError: another package has taken one of the names. FunASR itself would replace it without a word.
    """
    MooerDataloader.build_prompt = Prompt
    for (table, name), cls in CLASSES.items():
        taken = getattr(tables, table, {}).get(name)
        if taken is not None and taken is not cls:
            raise ConfigError(f"{table} already has '{name}' ({taken.__module__}); two plugins cannot share a name")
        if taken is None:
            tables.register(table, name)(cls)
