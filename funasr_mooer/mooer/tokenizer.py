"""The LLM's own tokenizer, as FunASR and the data tools use it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from funasr_mooer.errors import CheckpointError, ConfigError

# What decides how text becomes ids; weights and generation settings are left out.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "added_tokens.json")


class MooerTokenizer:
    """A Hugging Face tokenizer read from a folder; adds no special tokens of its own.

    Args:
        init: folder of the LLM, or of its tokenizer alone.

    Raises:
        CheckpointError: the folder holds no tokenizer.
        ConfigError: the tokenizer has no end-of-sequence or no padding token.
    """

    def __init__(self, init: str):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self.folder = Path(init)
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"tokenizer_conf.init: {init} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES[:2])}, ...); "
                "give the folder of the base LLM with ++tokenizer_conf.init=DIR"
            )
        # tokenizer.json as it stands: AutoTokenizer would put Qwen's own splitting in its place beside a Qwen config.json.
        whole = (self.folder / "tokenizer.json").is_file()
        cls = PreTrainedTokenizerFast if whole else AutoTokenizer
        self._tokenizer = cls.from_pretrained(str(self.folder), local_files_only=True)
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(self._tokenizer, name) is None:
                raise ConfigError(f"{init}: the tokenizer has no {name[:3]} token; set it in tokenizer_config.json")

    @property
    def eos_id(self) -> int:
        """Ends an answer: <|im_end|> in Qwen's chat format."""
        return self._tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Fills rows; also the blank of CTC heads over this vocabulary."""
        return self._tokenizer.pad_token_id

    @property
    def unk_id(self) -> int | None:
        """Stands for words that are not in the vocabulary; None for byte-level tokenizers, which know every text."""
        return self._tokenizer.unk_token_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files that decide how text becomes ids."""
        digest = hashlib.sha256()
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                digest.update(name.encode() + (self.folder / name).read_bytes())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; control tokens written in it (``<|im_start|>``) become control tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that comes from a corpus: control tokens written in it stay ordinary characters."""
        if not any(token in text for token in self._tokenizer.all_special_tokens):
            return self.encode(text)
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without control tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included; FunASR counts it."""
        return self._tokenizer.get_vocab()
