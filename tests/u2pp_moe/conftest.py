"""A tiny U2++ MoE over five words, and batches in which each word has a sound of its own."""

import pytest
import torch

from funasr_mooer.border.build import build_model
from funasr_mooer.u2pp_moe.tokenizer import write_units

WORDS = ["<blank>", "<unk>", "<sos/eos>", "a", "b", "c", "d"]
MELS = 16


@pytest.fixture(scope="session")
def units(tmp_path_factory):
    file = tmp_path_factory.mktemp("units") / "units.txt"
    write_units(WORDS, file)
    return str(file)


@pytest.fixture
def config(units):
    experts = {"mlp_type": "moe", "n_expert": 4, "n_expert_activated": 2, "dropout_rate": 0.0}
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 2, "positional_dropout_rate": 0.0}
    return {
        "model": "U2ppMoE",
        "frontend": "WavFrontend",
        "frontend_conf": {"window": "povey", "lfr_m": 1, "lfr_n": 1, "n_mels": MELS, "dither": 0.0},
        "tokenizer": "MooerUnitsTokenizer",
        "tokenizer_conf": {"init": units},
        "encoder": "MoEConformerEncoder",
        "encoder_conf": {
            **sizes,
            **experts,
            "output_size": 16,
            "input_layer": "conv2d",
            "causal": True,
            "use_dynamic_chunk": True,
            "cnn_module_kernel": 5,
        },
        "decoder": "MoEBiTransformerDecoder",
        "decoder_conf": {**sizes, **experts, "r_num_blocks": 1},
    }


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return build_model(config)


def spoken(words, frames_each=12):
    """Features (T, 16) in which each word is a pattern of its own, with silence around."""
    patterns = torch.randn(len(WORDS), MELS, generator=torch.Generator().manual_seed(7))
    patterns[0] = 0
    rows = [i for word in words for i in [0] * 8 + [word] * frames_each]
    return patterns[rows + [0] * 10]


@pytest.fixture
def batch():
    transcripts = [[3, 4, 5], [4, 4], [5, 3, 3, 6]]
    feats = [spoken(words) for words in transcripts]
    return {
        "feats": torch.nn.utils.rnn.pad_sequence(feats, batch_first=True),
        "feat_lengths": torch.tensor([len(f) for f in feats]),
        "transcript_ids": torch.tensor([words + [0] * (4 - len(words)) for words in transcripts]),
        "transcript_lengths": torch.tensor([len(words) for words in transcripts]),
    }
