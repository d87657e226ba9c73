"""Units: characters, words and sentence pieces to ids and back."""

import pickle

import pytest

from funasr_mooer.errors import CheckpointError, ConfigError, DataError
from funasr_mooer.u2pp_moe.tokenizer import MooerUnitsTokenizer, make_units, train_pieces, write_units


def table(tmp_path, units, **conf):
    file = tmp_path / "units.txt"
    write_units(units, file)
    return MooerUnitsTokenizer(str(file), **conf)


def test_characters_with_spaces_and_noises(tmp_path):
    tokenizer = table(tmp_path, ["<blank>", "<unk>", "<sos/eos>", "▁", "<noise>", "a", "b", "你"])
    assert not tokenizer.split_with_space
    assert tokenizer.encode(" ab 你<noise>x") == [5, 6, 3, 7, 4, 1]
    assert tokenizer.encode("<blank>") == [1, 6, 1, 5, 1, 1, 1]  # in a text it is no blank
    assert tokenizer.decode([0, 5, 6, 3, 7, 2]) == "ab 你"
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.sos_id, tokenizer.eos_id) == (0, 1, 2, 2)
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 8


def test_words(tmp_path):
    tokenizer = table(tmp_path, make_units(["turn it on", "turn it off"], split_with_space=True))
    assert tokenizer.split_with_space
    ids = tokenizer.encode("turn it up")
    assert ids[-1] == tokenizer.unk_id
    assert tokenizer.decode(ids[:2]) == "turn it"


def test_a_space_that_is_no_unit_is_left_out(tmp_path):
    tokenizer = table(tmp_path, make_units(["打开灯"]))
    assert tokenizer.decode(tokenizer.encode("打 开 灯")) == "打开灯"


def test_old_tables_end_with_the_start_and_end_symbol(tmp_path):
    tokenizer = table(tmp_path, ["<blank>", "a", "<sos/eos>"])
    assert (tokenizer.sos_id, tokenizer.eos_id) == (2, 2)
    with pytest.raises(DataError, match="'b' is not in units.txt, which has no <unk>"):
        tokenizer.encode("ab")
    other = table(tmp_path, ["<blank>", "a", "b"], special_tokens={"<sos>": 1, "<eos>": 2})
    assert (other.sos_id, other.eos_id, other.decode([0, 1, 2])) == (1, 2, "")


def test_sentence_pieces(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["TURN ON THE LIGHT", "TURN OFF THE LIGHT", "WHAT TIME IS IT", "PLAY SOME MUSIC PLEASE"]
    (tmp_path / "text").write_text("\n".join(texts * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "bpe"), vocab_size=27, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    write_units(
        ["<blank>", "<unk>", "<sos/eos>", *(pieces.id_to_piece(i) for i in range(3, 27)), "灯"], tmp_path / "units.txt"
    )
    tokenizer = MooerUnitsTokenizer(str(tmp_path))  # finds bpe.model beside the table
    assert tokenizer.decode(tokenizer.encode("turn the light灯")) == "TURN THE LIGHT灯"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("PLAY MUSIC") == tokenizer.encode("PLAY MUSIC")
    assert again.fingerprint == tokenizer.fingerprint


def test_units_of_two_languages_are_characters_and_pieces(tmp_path):
    pytest.importorskip("sentencepiece")
    texts = ["turn on the light", "打开 客厅 的 灯 please", "turn off the light please"] * 4
    pieces = train_pieces(texts, 40, tmp_path / "bpe.model")
    write_units(make_units(texts, pieces=pieces), tmp_path / "units.txt")
    tokenizer = MooerUnitsTokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("turn on the light")) == "TURN ON THE LIGHT"
    assert tokenizer.split("关灯")[1] == "灯"
    assert tokenizer.unk_id not in tokenizer.encode("打开 the 灯")
    with pytest.raises(DataError, match="no words in these texts"):
        train_pieces(["打开"], 40, tmp_path / "bpe.model")


def test_what_is_no_table_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"units.txt does not exist; give units.txt"):
        MooerUnitsTokenizer(str(tmp_path))
    (tmp_path / "units.txt").write_text("<blank> 0\na 2\n")
    with pytest.raises(ConfigError, match="without gaps"):
        MooerUnitsTokenizer(str(tmp_path))
    (tmp_path / "units.txt").write_text("<blank> 0\na\n")
    with pytest.raises(ConfigError, match=r"units.txt:2: expected 'unit id', found 'a'"):
        MooerUnitsTokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"special_tokens.<sos>=9"):
        table(tmp_path, ["<blank>", "a"], special_tokens={"<sos>": 9})
