"""Small stand-ins with the interfaces of MooerTokenizer and Prompt, and a corpus of tones."""

import numpy as np

AUDIO_ID = -1


class Tokenizer:
    """Bytes as ids, 0 pads, 1 ends."""

    pad_id, eos_id, fingerprint = 0, 1, "bytes"

    def encode(self, text):
        return [byte + 2 for byte in text.encode()]

    def decode(self, ids):
        return bytes(int(i) - 2 for i in ids if i > 1).decode()

    def get_vocab(self):
        return {str(i): i for i in range(258)}


class Prompt:
    """Two tasks of different prompt lengths, and both answers in one."""

    tasks = {"asr": ["text"], "ast": ["text.en"], "asr_ast": ["text", "text.en"]}

    def ids(self, task):
        return [AUDIO_ID, *range(300, 303 + len(task))]

    def answer_ids(self, task, fields):
        ids = []
        for number, field in enumerate(self.tasks[task]):
            ids += [12] * bool(number) + [int(i) for i in fields[field]]
        return [*ids, 1]

    def tasks_for(self, fields):
        return [task for task, needs in self.tasks.items() if all(field in fields for field in needs)]


def tone(seconds, seed=0):
    rng = np.random.default_rng(seed)
    n = int(seconds * 16000)
    return (0.3 * np.sin(np.arange(n) * rng.uniform(0.02, 0.5)) + 0.01 * rng.standard_normal(n)).astype(np.float32)


def write_corpus(folder, seconds, english=lambda i: i % 2 == 0):
    """A Kaldi directory of tones utt000, utt001, ... of these lengths in seconds."""
    from funasr_mooer.data.audio import write_wav
    from funasr_mooer.data.kaldi_dir import Utterance, write_kaldi_dir

    (folder / "wav").mkdir(parents=True, exist_ok=True)
    utts = []
    for i, s in enumerate(seconds):
        path = folder / f"wav/utt{i:03d}.wav"
        write_wav(path, tone(s, i))
        texts = {"text": f"你好 number {i}"} | ({"text.en": f"hello {i}"} if english(i) else {})
        utts.append(Utterance(f"utt{i:03d}", str(path), texts, lang="zh" if i % 3 else "en"))
    write_kaldi_dir(folder / "train", utts)
    return folder / "train"
