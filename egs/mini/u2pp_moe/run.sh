#!/usr/bin/env bash
# U2++ MoE in miniature: Mandarin and English recognition, streaming and not, all made here, no download, on a CPU.
#   ./run.sh                                   # everything: data, MoE and dense model, decoding, scores
#   ./run.sh --models moe                      # without the dense twin
#   ./run.sh --stage 2 --exp exp/seed1 --seed 1     # train, decode and score with another seed
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
train_utts=6000                          # half Mandarin, half English
models="moe dense"                       # both, or one of them
moe=../../../conf/u2pp_moe_tiny.yaml
dense=../../../conf/u2pp_moe_tiny_dense.yaml
moe_steps=1500 dense_steps=2050          # updates: equal CPU time
average_by=last average_n=1              # the last checkpoint: the learning rate has come down
exp=exp                                  # models, logs and scores land here
device=auto seed=0                       # device: auto, cuda, musa or cpu
nproc=2                                  # devices, or processes on a CPU
mild=("++dataset_conf.augment.freq_masks=1" "++dataset_conf.augment.freq_mask_bins=8") # synthetic voices need less
mild+=("++dataset_conf.augment.time_masks=1" "++dataset_conf.augment.time_mask_ms=120")
given="moe dense"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/u2pp.sh                   # units, pack, cmvn, {train,average,decode,score,table}_models

if want 0 "sentences -> data/{train,dev,test_zh,test_en}/{wav.scp,text}: espeak-ng speaks"; then
  py ../local/prepare.py --out data --train-utts "$train_utts" --nj "$nj"
fi
if want 1 "data/* -> data/units (hanzi and words), data/pack/*, data/am.mvn"; then
  units train --pieces 300
  pack data/units train dev
  cmvn train data/am.mvn "$moe"
fi
if want 2 "data/pack -> $exp/{moe,dense}"; then
  train_models train dev "$as_two" "++train_conf.decode_metric=mer" "${mild[@]}"
fi
if want 3 "$exp/*/checkpoints -> $exp/*/average"; then
  average_models
fi
if want 4 "data/test_* -> $exp/*/decode/*/*/text: full context and chunks, four searches"; then
  decode_models test_zh test_en
fi
if want 5 "text -> error rates (hanzi and English words) and RTF in README.md"; then
  score_models mer test_zh test_en
  table_models mini test_zh test_en
fi
