"""Rank the LLM's answers, and the CTC head's own transcript, by both models together.

An LLM that decodes speech may say a word twice or leave one out, and still find its answer fluent; the CTC head of the
encoder hears every word and knows no language. Each candidate y of an utterance x is scored as in joint CTC/attention
decoding (Watanabe et al., 2017): log P_LLM(y | x) + ctc_weight * log P_CTC(y | x).
"""

# Shapes: B utterances, C candidates in all, T encoder frames, V vocabulary, D LLM size, U audio embeddings, N labels.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from funasr_mooer.modules.splice import IGNORE_INDEX, splice_audio
from funasr_mooer.mooer.generate import Answer
from funasr_mooer.mooer.llm import LoRAQwenDecoder


def candidates(beams: Sequence[Sequence[Answer]], drafts: Sequence[Sequence[int]], eos_id: int) -> list[list[Answer]]:
    """Per utterance: the different answers of the beams, best first, then the CTC transcript if it is none of them."""
    rows = []
    for answers, draft in zip(beams, drafts, strict=True):
        row: dict[tuple[int, ...], Answer] = {}
        for answer in [*answers, Answer([*draft, eos_id])]:
            row.setdefault(tuple(answer.token_ids), answer)
        rows.append(list(row.values()))
    return rows


def llm_log_likelihoods(
    llm: LoRAQwenDecoder, audio_embeds: Tensor, audio_lengths: Tensor, prompt: Sequence[int], answers: list[list[int]]
) -> Tensor:
    """log P(answer | audio, prompt) of each row, (C,), float32.

    Args:
        llm: the language model.
        audio_embeds: (C, U, D) of each row.
        audio_lengths: (C,).
        prompt: token ids of the prompt, the audio's placeholder included.
        answers: token ids of each row's answer, end of sequence included.
    """
    longest = max(map(len, answers))
    ids = torch.full((len(answers), len(prompt) + longest), IGNORE_INDEX, device=audio_embeds.device)
    for row, answer in enumerate(answers):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
    mask = ids != IGNORE_INDEX
    labels = ids.clone()
    labels[:, : len(prompt)] = IGNORE_INDEX
    spliced = splice_audio(ids, mask, llm.embed(ids), audio_embeds, audio_lengths, labels)
    hidden, targets = llm.labelled_states(spliced.inputs_embeds, spliced.labels)  # (N, D), (N,)
    log_probs = -nn.functional.cross_entropy(
        llm.model.get_output_embeddings()(hidden).float(), targets, reduction="none"
    )
    row_of = torch.arange(len(answers), device=ids.device).repeat_interleave((labels != IGNORE_INDEX).sum(1))
    return log_probs.new_zeros(len(answers)).index_add(0, row_of, log_probs)


def ctc_log_likelihoods(log_probs: Tensor, lengths: Tensor, answers: list[list[int]], blank_id: int) -> Tensor:
    """log P_CTC(answer) of each row, (C,); minus infinity where the frames cannot carry the tokens.

    Args:
        log_probs: (C, T, V).
        lengths: (C,) frames.
        answers: token ids of each row, without end of sequence.
        blank_id: id of the blank.
    """
    # A blank among the tokens has no path; as a target it would be read as one.
    spelt = [blank_id not in answer for answer in answers]
    targets = [token for answer in answers for token in answer if token != blank_id]
    sizes = [sum(token != blank_id for token in answer) for answer in answers]
    losses = nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        torch.tensor(targets, dtype=torch.long, device=log_probs.device),
        lengths,
        torch.tensor(sizes, device=lengths.device),
        blank=blank_id,
        reduction="none",
    )
    return torch.where(torch.tensor(spelt, device=losses.device), -losses, -torch.inf)


def best(rows: list[list[Answer]], llm_scores: Tensor, ctc_scores: Tensor, ctc_weight: float) -> list[Answer]:
    """The candidate with the best joint score of each utterance; its score is put into the answer.

    Args:
        rows: candidates of each utterance.
        llm_scores: (C,) in the order of the rows.
        ctc_scores: (C,).
        ctc_weight: weight of the latter.
    """
    scores = (llm_scores + ctc_weight * ctc_scores).split([len(row) for row in rows])
    chosen = []
    for row, score in zip(rows, scores, strict=True):
        # Where no candidate can be spelt by CTC, the first beam stays.
        place = int(score.argmax()) if torch.isfinite(score).any() else 0
        chosen.append(Answer(row[place].token_ids, float(score[place])))
    return chosen
