#!/usr/bin/env bash
# AISHELL-1, Mandarin speech recognition with U2++ MoE, streaming and not. Every stage can be rerun alone.
#   ./run.sh --corpus /data/data_aishell --nproc 8
#   ./run.sh --corpus /data/data_aishell --models "moe dense"     # the dense model beside it
#   ./run.sh --stage 4 --exp exp/other                   # decode and score another run
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=                                  # data_aishell, unpacked: wav/ and transcript/
models=moe                               # moe, dense or "moe dense"
moe=../../../conf/u2pp_moe_base.yaml
dense=../../../conf/u2pp_moe_base_dense.yaml
moe_steps='' dense_steps=''              # updates; empty: as the configs say
average_n=10                             # best checkpoints to average
exp=exp                                  # models, logs and scores land here
device=auto nproc=1 seed=42              # device: auto, cuda, musa or cpu; nproc: devices (or CPU processes)
given="corpus moe dense"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/u2pp.sh                   # units, pack, cmvn, {train,average,decode,score,table}_models

if want 0 "corpus -> data/{train,dev,test}/{wav.scp,text,utt2spk}"; then
  need corpus "unpack https://www.openslr.org/33 there"
  py ../local/prepare.py --corpus "$corpus" --out data
fi
if want 1 "data/* -> data/units (characters), data/pack/*, data/am.mvn"; then
  units train
  pack data/units train dev
  cmvn train data/am.mvn "$moe"
fi
if want 2 "data/pack -> $exp/{moe,dense}"; then
  train_models train dev
fi
if want 3 "$exp/*/checkpoints -> $exp/*/average"; then
  average_models
fi
if want 4 "data/test -> $exp/*/decode/*/*/text: full context and chunks, four searches"; then
  decode_models test
fi
if want 5 "text -> CER and RTF in README.md"; then
  score_models cer test
  table_models aishell test
fi
