"""The tokenizer of an LLM folder is the one that lies in it."""

from funasr_mooer.mooer.tokenizer import MooerTokenizer


def test_tokenizer_json_counts_even_beside_the_config_of_a_qwen(tiny_llm):
    tokenizer = MooerTokenizer(str(tiny_llm))
    ids = tokenizer.encode("turn on the light")
    assert [tokenizer.get_vocab()[word] for word in "turn on the light".split()] == ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "turn on the light"
    assert tokenizer.encode("<|im_start|>user")[0] == tokenizer.get_vocab()["<|im_start|>"]
