#!/usr/bin/env bash
# A corpus of a few hours that exists as Kaldi directories, with a U2++ MoE small enough for two CPU cores.
#   ./run.sh --corpus aishell_sample                       # Mandarin: characters, CER
#   ./run.sh --corpus en_orders --pieces 100 --metric wer  # English: sentence pieces, WER
#   ./run.sh --stage 4 --exp exp/other                     # decode and score another run
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=                                  # folder with Kaldi directories train, dev and test
pieces=''                                # sentence pieces of words; empty: characters
metric=cer                               # cer, wer or mer
models=moe                               # moe, dense or "moe dense"
moe=../../../conf/u2pp_moe_tiny.yaml
dense=../../../conf/u2pp_moe_tiny_dense.yaml
moe_steps=3000 dense_steps=3400          # equal CPU time
average_n=3                              # best checkpoints to average
exp=exp                                  # models, logs and scores land here
device=auto seed=0                       # device: auto, cuda, musa or cpu
nproc=2                                  # devices, or processes on a CPU
given="corpus moe dense"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/u2pp.sh                   # units, pack, cmvn, {train,average,decode,score,table}_models

if want 0 "corpus -> data/{train,dev,test}/{wav.scp,text}, levelled"; then
  need corpus "give a folder with train/wav.scp, dev/wav.scp and test/wav.scp"
  py ../local/prepare.py --corpus "$corpus" --out data --nj "$nj"
fi
if want 1 "data/* -> data/units, data/pack/*, data/am.mvn"; then
  units train ${pieces:+--pieces "$pieces"}
  pack data/units train dev
  cmvn train data/am.mvn "$moe"
fi
if want 2 "data/pack -> $exp/{moe,dense}"; then
  train_models train dev "$as_two" "++train_conf.decode_metric=$metric" "++dataset_conf.augment.speed=[0.9,1.0,1.1]"
fi
if want 3 "$exp/*/checkpoints -> $exp/*/average"; then
  average_models
fi
if want 4 "data/test -> $exp/*/decode/*/*/text: full context and chunks, four searches"; then
  decode_models test
fi
if want 5 "text -> error rate and RTF in README.md"; then
  score_models "$metric" test
  table_models kaldi test
fi
