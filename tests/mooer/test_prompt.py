"""Prompts and answers: built once for training and decoding, tokenised apart, taken apart again."""

import pytest

from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.splice import AUDIO_ID
from funasr_mooer.mooer.prompt import TEMPLATE, Prompt


class Characters:
    """One token per character."""

    eos_id = 3

    def encode(self, text):
        return [ord(c) for c in text]


def test_the_released_wording_keeps_its_trailing_spaces():
    prompt = Prompt(Characters())
    assert list(prompt.tasks) == ["asr", "ast"]
    text = "".join(map(chr, prompt.ids("asr")[1:]))
    assert prompt.ids("asr")[0] == AUDIO_ID
    assert text == TEMPLATE.replace("{}", "Transcribe speech to text. ")


def test_answers_end_and_lines_are_joined():
    prompt = Prompt(Characters(), {"tasks": ["asr", "ast", "asr_ast"]})
    fields = {"text": [70, 71], "text.en": [80]}
    assert prompt.answer_ids("asr", fields) == [70, 71, 3]
    assert prompt.answer_ids("ast", fields) == [80, 3]
    assert prompt.answer_ids("asr_ast", fields) == [70, 71, ord("\n"), 80, 3]
    assert prompt.tasks_for(["text"]) == ["asr"]
    assert prompt.tasks_for(fields) == ["asr", "ast", "asr_ast"]


def test_answers_are_taken_apart():
    prompt = Prompt(Characters(), {"tasks": ["asr", "asr_ast"]})
    assert prompt.parse("asr", " 你好 ") == {"text": "你好"}
    assert prompt.parse("asr_ast", "你好\nhello") == {"text": "你好", "text.en": "hello"}
    assert prompt.parse("asr_ast", "你好") == {"text": "你好", "text.en": ""}


def test_a_task_that_was_not_trained_lists_those_that_were():
    with pytest.raises(ConfigError, match="task 'ast' is not one that this model was trained for; did you mean 'asr'"):
        Prompt(Characters(), {"tasks": ["asr"]}).ids("ast")
    with pytest.raises(ConfigError, match="known: asr, ast"):
        Prompt(Characters()).ids("summarise")


def test_a_new_task_needs_its_own_words():
    conf = {"tasks": {"intent": {"instruction": "Which intent? ", "answer": ["text.intent"]}}}
    assert Prompt(Characters(), conf).tasks_for(["text.intent"]) == ["intent"]
    with pytest.raises(ConfigError, match=r"prompt_conf.tasks.intent: is not a known task"):
        Prompt(Characters(), {"tasks": ["intent"]})
    with pytest.raises(ConfigError, match="instructon: unknown key; did you mean 'instruction'"):
        Prompt(Characters(), {"tasks": {"intent": {"instructon": "x", "answer": ["text"]}}})


def test_a_template_needs_one_place_for_the_instruction():
    with pytest.raises(ConfigError, match="exactly once"):
        Prompt(Characters(), {"template": "no place"})
