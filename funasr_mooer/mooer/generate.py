"""Decoding settings and the search itself: greedy and beam, batches equal to single utterances."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funasr_mooer.config import check_least, overlay
from funasr_mooer.errors import ConfigError
from funasr_mooer.mooer.llm import LoRAQwenDecoder
from funasr_mooer.mooer.tokenizer import MooerTokenizer

TextCallback = Callable[[list[str]], None]


@dataclasses.dataclass
class DecodeConf:
    """How answers are searched for; the defaults are the released system's.

    Attributes:
        num_beams: 1 is greedy search.
        max_new_tokens: longest answer, tokens.
        length_penalty: beam scores are divided by length to this power.
        eos_bias: added to the score of the end of sequence; below 0 answers get longer.
        repetition_penalty: above 1 makes tokens of the answer less likely to come again.
        no_repeat_ngram_size: no sequence of so many tokens may come twice; 0 switches it off.
        repetition_guard: an answer that repeats one phrase more often than this in a row is cut there; 0 is off.
        min_length: fewest positions of audio, prompt and answer together: transformers counts so where it is given
            embeddings, and the released system sets 1.
        ctc_weight: above 0, for tasks that ask for the transcript, the beams and the CTC head's own transcript are
            ranked by both models together; the weight is that of the CTC head's log-probability.
    """

    num_beams: int = 4
    max_new_tokens: int = 200
    length_penalty: float = 0.8
    eos_bias: float = -0.2
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    repetition_guard: int = 0
    min_length: int = 1
    ctc_weight: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, "decode_conf", num_beams=1, max_new_tokens=1, min_length=0)
        check_least(self, "decode_conf", no_repeat_ngram_size=0, repetition_guard=0)
        if self.repetition_penalty <= 0:
            raise ConfigError(
                f"decode_conf.repetition_penalty={self.repetition_penalty}: must be above 0; 1 changes nothing"
            )
        if self.ctc_weight < 0:
            raise ConfigError(f"decode_conf.ctc_weight={self.ctc_weight}: must not be below 0")


DECODE_KEYS = tuple(field.name for field in dataclasses.fields(DecodeConf))


def decode_conf(values: Mapping[str, Any] | None, call: Mapping[str, Any] | None = None) -> DecodeConf:
    """Decoding settings of a config, and those of a call, which go first; what else the call holds is passed over."""
    return overlay(DecodeConf, values, call, "decode_conf")


@dataclasses.dataclass
class Answer:
    """One decoded row.

    Attributes:
        token_ids: the answer, end of sequence included, padding left out.
        score: log-probability divided by length penalty (beam search); with ``ctc_weight`` the joint score; else None.
    """

    token_ids: list[int]
    score: float | None = None


def search(
    llm: LoRAQwenDecoder,
    tokenizer: MooerTokenizer,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    conf: DecodeConf,
    on_text: TextCallback | None = None,
    nbest: int = 1,
) -> list[Answer]:
    """Search the best answers of each row.

    Args:
        llm: the language model.
        tokenizer: gives the ids that end and pad answers, and texts for ``on_text``.
        inputs_embeds: (B, S, D_llm) prompts, padded on the left.
        attention_mask: (B, S), false at padding.
        conf: the search.
        on_text: called with the texts so far of all rows after each token (greedy search only).
        nbest: answers of each row, at most ``conf.num_beams``.

    Returns:
        B * nbest answers, those of one row together, best first.

    Raises:
        ConfigError: ``on_text`` together with beam search.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    if on_text is not None and conf.num_beams > 1:
        raise ConfigError(f"text can be streamed only with num_beams=1, not {conf.num_beams}: beams change their minds")
    beams: dict[str, Any] = {"num_beams": conf.num_beams}
    if conf.num_beams > 1:
        beams |= {"length_penalty": conf.length_penalty, "output_scores": True, "num_return_sequences": nbest}
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=conf.max_new_tokens,
        min_length=conf.min_length,
        repetition_penalty=conf.repetition_penalty,
        no_repeat_ngram_size=conf.no_repeat_ngram_size,
        sequence_bias=[[[tokenizer.eos_id], conf.eos_bias]] if conf.eos_bias else None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        return_dict_in_generate=True,
        **beams,
    )
    hooks = StoppingCriteriaList()
    if on_text is not None:
        hooks.append(_Report(on_text, tokenizer))
    if conf.repetition_guard and conf.num_beams == 1:
        hooks.append(_StopRepeating(conf.repetition_guard))
    with torch.no_grad():
        found = llm.model.generate(
            inputs_embeds=inputs_embeds.to(llm.embedding.weight.dtype),
            attention_mask=attention_mask.long(),
            generation_config=settings,
            stopping_criteria=hooks,
        )
    scores = [None] * len(found.sequences) if conf.num_beams == 1 else found.sequences_scores.tolist()
    answers = []
    for row, score in zip(found.sequences.tolist(), scores):
        ids = row[: row.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in row else row
        answers.append(Answer(cut_repetition(ids, conf.repetition_guard), score))
    return answers


def cut_repetition(ids: Sequence[int], limit: int, longest: int = 20) -> list[int]:
    """``ids`` up to where one phrase of at most ``longest`` tokens has come ``limit`` times in a row.

    With ``limit`` 0 nothing is cut. The phrases kept are ``limit`` in number: "go go go go" with 2 is "go go".
    """
    ids = list(ids)
    for end in range(1, len(ids) + 1) if limit else ():
        size = _repeated(ids[:end], limit + 1, longest)
        if size:
            return ids[: end - size]
    return ids


def _repeated(ids: Sequence[int], times: int, longest: int) -> int:
    """Length of the shortest phrase that ends ``ids`` ``times`` times in a row; 0 if there is none."""
    for size in range(1, min(longest, len(ids) // times) + 1):
        tail = ids[len(ids) - size * times :]
        if all(tail[i] == tail[i % size] for i in range(len(tail))):
            return size
    return 0


class _StopRepeating:
    """Ends rows whose last phrase has come more than ``limit`` times in a row."""

    def __init__(self, limit: int):
        self.limit = limit

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [bool(_repeated(row, self.limit + 1, longest=20)) for row in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)


class _Report:
    """Hands the texts so far to a callback; never stops a row."""

    def __init__(self, on_text: TextCallback, tokenizer: MooerTokenizer):
        self.on_text, self.tokenizer = on_text, tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.on_text([self.tokenizer.decode(row) for row in input_ids.tolist()])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
