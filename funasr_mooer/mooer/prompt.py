"""What stands around the audio: one object for training data, decoding and serving.

A row that the LLM reads is ``[audio][chat template with the task's instruction][answer]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from funasr_mooer.config import section, suggest
from funasr_mooer.errors import ConfigError
from funasr_mooer.modules.splice import AUDIO_ID

# The released models were trained with exactly these texts, trailing spaces included.
TEMPLATE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TASKS = {
    "asr": {"instruction": "Transcribe speech to text. ", "answer": ["text"]},
    "ast": {"instruction": "Translate speech to english text. ", "answer": ["text.en"]},
    # The released multi-task model is asked with the translation prompt and answers in two lines.
    "asr_ast": {"instruction": "Translate speech to english text. ", "answer": ["text", "text.en"]},
    "s2s_trans": {"instruction": "Translate speech to english speech. ", "answer": ["text.en"]},
    "s2s_chat": {"instruction": "Answer my question with speech. ", "answer": ["text.answer"]},
}


class Tokenizer(Protocol):
    eos_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass
class TaskConf:
    """One thing that a model can be asked.

    Attributes:
        instruction: the user's words; goes where the template has ``{}``.
        answer: the text fields of an utterance that make up the answer, one line each.
    """

    instruction: str
    answer: list[str]


@dataclasses.dataclass
class PromptConf:
    """``prompt_conf``: the chat template and the tasks that a model is trained for.

    Attributes:
        template: text with one ``{}`` for the instruction.
        tasks: names, or names with their own instruction and answer.
    """

    template: str = TEMPLATE
    tasks: Mapping | list | None = None


class Prompt:
    """Builds prompts and answers as token ids, and takes answers apart again.

    Prompt and answer are tokenised apart, so no merge across their border can shift a label.

    Args:
        tokenizer: the LLM's.
        conf: the ``prompt_conf`` section; by default the released models' ASR and translation.

    Raises:
        ConfigError: a task without instruction or answer, a template without ``{}``.
    """

    def __init__(self, tokenizer: Tokenizer, conf: Mapping | None = None):
        conf = section(PromptConf, conf, "prompt_conf")
        if conf.template.count("{}") != 1:
            raise ConfigError("prompt_conf.template: must hold {} exactly once, where the instruction goes")
        self.template = conf.template
        self.tasks = _tasks(conf.tasks)
        self._eos = tokenizer.eos_id
        self._newline = tokenizer.encode("\n")
        self._prompts = {
            name: tokenizer.encode(conf.template.replace("{}", task.instruction)) for name, task in self.tasks.items()
        }

    def ids(self, task: str) -> list[int]:
        """``[AUDIO_ID]`` and the prompt's token ids; the answer follows them."""
        self._known(task)
        return [AUDIO_ID, *self._prompts[task]]

    def answer_ids(self, task: str, fields: Mapping[str, Sequence[int]]) -> list[int]:
        """Token ids that the model should answer, end of sequence included.

        Args:
            task: name of the task.
            fields: token ids of each text field of the utterance (``text``, ``text.en``).
        """
        ids: list[int] = []
        for number, field in enumerate(self._known(task).answer):
            ids += [*(self._newline if number else []), *map(int, fields[field])]
        return [*ids, self._eos]

    def tasks_for(self, fields: Mapping[str, object] | Sequence[str]) -> list[str]:
        """The tasks whose answer can be built from these text fields."""
        return [name for name, task in self.tasks.items() if all(field in fields for field in task.answer)]

    def parse(self, task: str, answer: str) -> dict[str, str]:
        """A decoded answer as result fields: ``text``, and one entry more for each further line.

        ``asr_ast`` gives ``text`` (transcript) and ``text.en`` (translation, empty if the model gave one line).
        """
        first, *others = self._known(task).answer
        if not others:
            return {"text": answer.strip()}
        lines = [line.strip() for line in answer.strip().split("\n", len(others))]
        lines += [""] * (1 + len(others) - len(lines))
        return {"text": lines[0], **dict(zip(others, lines[1:]))}

    def _known(self, task: str) -> TaskConf:
        if task not in self.tasks:
            raise ConfigError(f"task '{task}' is not one that this model was trained for{suggest(task, self.tasks)}")
        return self.tasks[task]


def _tasks(tasks: Mapping | Sequence[str] | None) -> dict[str, TaskConf]:
    """``prompt_conf.tasks`` as typed tasks; names alone take the released models' wording."""
    if tasks is None:
        tasks = ["asr", "ast"]
    if not isinstance(tasks, Mapping):
        tasks = {name: None for name in tasks}
    found = {}
    for name, values in tasks.items():
        where = f"prompt_conf.tasks.{name}"
        if values is None and name not in TASKS:
            raise ConfigError(
                f"{where}: is not a known task, so it needs an instruction and an answer{suggest(name, TASKS)}"
            )
        found[name] = section(TaskConf, {**TASKS.get(name, {}), **(values or {})}, where)
        if not found[name].answer:
            raise ConfigError(f"{where}.answer: name at least one text field, such as [text]")
    if not found:
        raise ConfigError("prompt_conf.tasks: name at least one task")
    return found
