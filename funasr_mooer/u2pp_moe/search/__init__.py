"""From probabilities to tokens: CTC greedy and prefix beam search, attention beam search, attention rescoring.

Each search treats the utterances of a batch apart: a batch gives what its utterances give alone.
"""

from funasr_mooer.u2pp_moe.search.attention import attention_search
from funasr_mooer.u2pp_moe.search.ctc import GreedyPath, PrefixBeam, ctc_greedy_search, ctc_prefix_beam_search
from funasr_mooer.u2pp_moe.search.hypothesis import Hypothesis
from funasr_mooer.u2pp_moe.search.rescoring import attention_rescoring
from funasr_mooer.u2pp_moe.search.settings import DECODE_KEYS, METHODS, DecodeConf, decode_conf

__all__ = [
    "DECODE_KEYS",
    "METHODS",
    "DecodeConf",
    "GreedyPath",
    "Hypothesis",
    "PrefixBeam",
    "attention_rescoring",
    "attention_search",
    "ctc_greedy_search",
    "ctc_prefix_beam_search",
    "decode_conf",
]
