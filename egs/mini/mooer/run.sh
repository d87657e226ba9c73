#!/usr/bin/env bash
# MooER in miniature: Mandarin and English recognition and translation, all made here, no download, on a CPU.
#   ./run.sh                                   # everything: data, encoder, language model, MooER, scores
#   ./run.sh --stage 4 --exp exp/other         # train MooER again on the same data, decode and score it
#   ./run.sh --dry-run                         # print the commands
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=6
train_utts=6000                          # half Mandarin, half English
exp=exp                                  # encoder, language model, MooER, logs and scores land here
device=auto seed=0                       # device: auto, cuda, musa or cpu
nproc=2                                  # devices, or processes on a CPU
. ../../common/recipe.sh                 # --flags, want, run, py, log, die
. ../../common/mooer.sh                  # pack, train, average, decode, score, table

llm=$exp/llm                             # tokenizer in stage 1, weights in stage 3
if want 0 "sentences -> data/{train,dev,test,...}/{wav.scp,text,text.en}: espeak-ng speaks"; then
  py ../local/prepare.py --out data --train-utts "$train_utts" --seed "$seed" --nj "$nj"
fi
if want 1 "data/* -> $llm (tokenizer), data/pack/*, $exp/am.mvn"; then
  py ../local/make_tokenizer.py --out "$llm"
  pack "$llm" train dev
  cmvn train "$exp/am.mvn"
fi
if want 2 "data/pack -> $exp/encoder/model: conformer with CTC head"; then
  train conf/encoder.yaml "$exp/encoder" train dev "++tokenizer_conf.init=$llm" "++frontend_conf.cmvn_file=$exp/am.mvn"
fi
if want 3 "text -> $llm: a tiny Qwen2 that copies and translates"; then
  py ../local/pretrain_llm.py --llm "$llm" --seed "$seed" --threads "$nproc"
fi
if want 4 "data/pack, encoder, llm -> $exp/mooer/model: adapter warm-up, then adapter and LoRA"; then
  train conf/mooer.yaml "$exp/mooer" train dev "++llm_conf.init=$llm" "++tokenizer_conf.init=$llm" \
    "++encoder_conf.init=$exp/encoder/model" "++ctc_conf.init=$exp/encoder/model" "++frontend_conf.cmvn_file=$exp/am.mvn"
fi
if want 5 "data/test_* -> $exp/*/decode/*/text"; then
  decode "$exp/encoder/model" "$exp/encoder/decode" test_zh:asr test_en:asr
  decode "$exp/mooer/model" "$exp/mooer/decode_llm" test_zh:asr test_en:asr ++ctc_weight=0
  decode "$exp/mooer/model" "$exp/mooer/decode" test_zh:asr test_en:asr test_zh:ast
fi
if want 6 "text -> CER, WER, BLEU in README.md"; then
  score "$exp/encoder/decode" "encoder, CTC, seed $seed" test_zh:asr:cer test_en:asr:wer
  score "$exp/mooer/decode_llm" "MooER, LLM alone, seed $seed" test_zh:asr:cer test_en:asr:wer
  score "$exp/mooer/decode" "MooER, LLM and CTC, seed $seed" test_zh:asr:cer test_en:asr:wer
  score "$exp/mooer/decode" "MooER, seed $seed" test_zh:ast:bleu
  table README.md mini "$exp"/{encoder/decode,mooer/decode_llm,mooer/decode}/test_{zh,en}.asr/result.json \
    "$exp/mooer/decode/test_zh.ast/result.json"
fi
