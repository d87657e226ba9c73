"""Folders that are not model directories of ours, and what is said of them."""

import pytest

from funasr_mooer.errors import CheckpointError
from funasr_mooer.model_dir import read_model_dir


def test_a_folder_without_a_config_is_no_model_directory(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model directory"):
        read_model_dir(tmp_path)


def test_what_funasrs_own_trainer_wrote_is_not_taken_for_the_model_that_it_started_from(tmp_path):
    (tmp_path / "config.yaml").write_text("model: MooER\n")
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match=r"FunASR's own trainer wrote it .* use funasr.AutoModel"):
        read_model_dir(tmp_path)
