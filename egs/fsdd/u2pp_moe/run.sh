#!/usr/bin/env bash
# Connected English digits by people (Free Spoken Digit Dataset) with U2++: MoE beside dense, streaming and not.
#   ./run.sh --download                        # clone the corpus from its publisher, then everything
#   ./run.sh --corpus ~/free-spoken-digit-dataset --models moe
#   ./run.sh --stage 2 --exp exp/seed1 --seed 1     # train, decode and score with another seed
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=data/corpus                       # a clone of the corpus, or Kaldi dirs {train,dev,test,test_seen}
download=false                           # clone the corpus into --corpus
train_utts=6000                          # strings of 2 to 7 digits
models="moe dense"                       # both, or one of them
moe=../../../conf/u2pp_moe_tiny.yaml
dense=../../../conf/u2pp_moe_tiny_dense.yaml
moe_steps=1400 dense_steps=1900          # updates: equal CPU time
average_by=last average_n=1              # the last checkpoint: the learning rate has come down
exp=exp                                  # models, logs and scores land here
device=auto seed=0                       # device: auto, cuda, musa or cpu
nproc=2                                  # devices, or processes on a CPU
given="corpus moe dense"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/u2pp.sh                   # units, pack, cmvn, {train,average,decode,score,table}_models

if want 0 "corpus -> data/{train,dev,test,test_seen}/{wav.scp,text}"; then
  if [ "$download" = true ] && [ ! -d "$corpus" ]; then
    run git clone --depth 1 https://github.com/Jakobovski/free-spoken-digit-dataset.git "$corpus"
  fi
  need corpus "add --download, or clone https://github.com/Jakobovski/free-spoken-digit-dataset there"
  py ../local/prepare.py --corpus "$corpus" --out data --train-utts "$train_utts" --vary-voices --nj "$nj"
fi
if want 1 "data/* -> data/units (ten words), data/pack/*, data/am.mvn"; then
  units train --words
  pack data/units train dev
  cmvn train data/am.mvn "$moe"
fi
if want 2 "data/pack -> $exp/{moe,dense}"; then
  train_models train dev "$as_two"
fi
if want 3 "$exp/*/checkpoints -> $exp/*/average"; then
  average_models
fi
if want 4 "data/{test_seen,test} -> $exp/*/decode/*/*/text: full context and chunks, four searches"; then
  decode_models test_seen test
fi
if want 5 "text -> WER and RTF in README.md"; then
  score_models wer test_seen test
  table_models fsdd test_seen test
fi
