#!/usr/bin/env bash
# Connected English digits by people (Free Spoken Digit Dataset): the models of egs/mini learn real voices.
#   ./run.sh --download                        # clone the corpus from its publisher, then everything
#   ./run.sh --corpus ~/free-spoken-digit-dataset
#   ./run.sh --stage 4 --exp exp/other         # decode and score another run
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=data/corpus                       # a clone of the corpus, or Kaldi dirs {train,dev,test,test_seen}
download=false                           # clone the corpus into --corpus
train_utts=6000                          # strings of 2 to 7 digits
base=../../mini/mooer                    # the recipe, run before, whose models and training data we continue with
exp=exp                                  # checkpoints, logs and scores land here
device=auto seed=0                       # device: auto, cuda, musa or cpu
nproc=2                                  # devices, or processes on a CPU
given="corpus base"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/mooer.sh                  # pack, train, average, decode, score, table

start=$base/exp                          # encoder, llm and mooer of the base recipe
sets="train $base/data/pack/train"       # without the base's own data its other words are forgotten at once
tests=(test:asr test_seen:asr)
if want 0 "corpus -> data/{train,dev,test,test_seen}/{wav.scp,text}"; then
  if [ "$download" = true ] && [ ! -d "$corpus" ]; then
    run git clone --depth 1 https://github.com/Jakobovski/free-spoken-digit-dataset.git "$corpus"
  fi
  need corpus "add --download, or clone https://github.com/Jakobovski/free-spoken-digit-dataset there"
  py ../local/prepare.py --corpus "$corpus" --out data --train-utts "$train_utts" --seed "$seed" --nj "$nj"
fi
if want 1 "data/* -> data/pack/*: shards, index, tokens"; then
  pack "$start/llm" train dev
fi
if want 2 "data/pack -> $exp/encoder/model: the encoder hears people"; then
  train "$base/conf/encoder.yaml" "$exp/encoder" "$sets" dev "++tokenizer_conf.init=$start/llm" \
    "++frontend_conf.cmvn_file=$start/am.mvn" "++encoder_conf.init=$start/encoder/model" "++ctc_conf.init=$start/encoder/model" \
    "++encoder_conf.freeze=false" "++train_conf.max_steps=900" "++dataset_conf.ascending_epochs=0"
fi
if want 3 "data/pack, encoder -> $exp/mooer/model: adapter and LoRA"; then
  train "$base/conf/mooer.yaml" "$exp/mooer" "$sets" dev "++llm_conf.init=$start/llm" "++tokenizer_conf.init=$start/llm" \
    "++frontend_conf.cmvn_file=$start/am.mvn" "++encoder_conf.init=$exp/encoder/model" "++ctc_conf.init=$exp/encoder/model"
fi
if want 4 "data/{test,test_seen} -> $exp/*/decode/*/text"; then
  decode "$exp/encoder/model" "$exp/encoder/decode" "${tests[@]}"
  decode "$exp/mooer/model" "$exp/mooer/decode_llm" "${tests[@]}" ++ctc_weight=0
  decode "$exp/mooer/model" "$exp/mooer/decode" "${tests[@]}"
fi
if want 5 "text -> WER in README.md"; then
  score "$exp/encoder/decode" "encoder, CTC, seed $seed" "${tests[@]/%/:wer}"
  score "$exp/mooer/decode_llm" "MooER, LLM alone, seed $seed" "${tests[@]/%/:wer}"
  score "$exp/mooer/decode" "MooER, LLM and CTC, seed $seed" "${tests[@]/%/:wer}"
  table README.md fsdd "$exp"/{encoder/decode,mooer/decode_llm,mooer/decode}/test{,_seen}.asr/result.json
fi
