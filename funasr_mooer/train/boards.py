"""Where curves are shown besides the log: TensorBoard (EXP/tensorboard) and Weights & Biases."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from funasr_mooer.errors import DependencyError

log = logging.getLogger(__name__)


class Board(Protocol):
    """What a run tells a board."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step, by names such as ``train/loss``."""

    def text(self, step: int, name: str, markdown: str) -> None:
        """A table or another text."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """EXP/tensorboard; what an earlier attempt wrote after ``step`` is hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, exp: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(exp / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, markdown: str) -> None:
        self.writer.add_text(name, markdown, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases named after the experiment; the same experiment goes on in the same run.

    Raises:
        DependencyError: wandb is not installed.
    """

    def __init__(self, exp: Path):
        try:
            import wandb
        except ImportError as error:
            raise DependencyError("train_conf.wandb needs wandb: pip install 'funasr-mooer[wandb]'") from error
        run_id = hashlib.sha256(str(exp.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(project="funasr-mooer", name=exp.name, id=run_id, resume="allow", dir=str(exp))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, step: int, name: str, markdown: str) -> None:
        self.run.log({name: markdown}, step=step)

    def close(self) -> None:
        self.run.finish()


def open_boards(exp: Path, step: int, tensorboard: bool, wandb: bool) -> list[Any]:
    """The boards that were asked for; TensorBoard is said and left out where it is not installed.

    Raises:
        DependencyError: wandb is not installed.
    """
    boards: list[Board] = [WandB(exp)] if wandb else []
    if tensorboard:
        try:
            boards.append(TensorBoard(exp, step))
        except ImportError:
            log.info("tensorboard  not written: pip install funasr-mooer[train] brings tensorboard")
    return boards
