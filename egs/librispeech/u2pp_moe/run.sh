#!/usr/bin/env bash
# LibriSpeech, English speech recognition with U2++ MoE, streaming and not. Every stage can be rerun alone.
#   ./run.sh --corpus /data/LibriSpeech --nproc 8
#   ./run.sh --corpus /data/LibriSpeech --models "moe dense"     # the dense model beside it
#   ./run.sh --stage 4 --exp exp/other                   # decode and score another run
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=                                  # LibriSpeech, unpacked: train-clean-100/, ..., test-other/
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

if want 0 "corpus -> data/{train,dev,dev_clean,dev_other,test_clean,test_other}/{wav.scp,text,utt2spk}"; then
  need corpus "unpack https://www.openslr.org/12 there"
  py ../local/prepare.py --corpus "$corpus" --out data
fi
if want 1 "data/* -> data/units (5000 sentence pieces), data/pack/*, data/am.mvn"; then
  units train --pieces 5000
  pack data/units train dev
  cmvn train data/am.mvn "$moe"
fi
if want 2 "data/pack -> $exp/{moe,dense}"; then
  train_models train dev "++train_conf.decode_metric=wer"
fi
if want 3 "$exp/*/checkpoints -> $exp/*/average"; then
  average_models
fi
if want 4 "data/test_{clean,other} -> $exp/*/decode/*/*/text: full context and chunks, four searches"; then
  decode_models test_clean test_other
fi
if want 5 "text -> WER and RTF in README.md"; then
  score_models wer test_clean test_other
  table_models librispeech test_clean test_other
fi
