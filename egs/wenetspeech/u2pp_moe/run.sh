#!/usr/bin/env bash
# WenetSpeech, 10,000 hours of Mandarin from the web, with U2++ MoE, streaming and not. Every stage can be rerun alone.
#   ./run.sh --corpus /data/WenetSpeech --nproc 8
#   ./run.sh --corpus /data/WenetSpeech --models "moe dense"     # the dense model beside it
#   ./run.sh --stage 4 --exp exp/other                   # decode and score another run
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=                                  # WenetSpeech, decrypted: audio/ and WenetSpeech.json
subset=L                                 # L (10,005 hours), M (1,000) or S (100)
models=moe                               # moe, dense or "moe dense"
moe=../../../conf/u2pp_moe_1b.yaml
dense=../../../conf/u2pp_moe_225m_dense.yaml
moe_steps='' dense_steps=''              # updates; empty: as the configs say
average_n=10                             # best checkpoints to average
exp=exp                                  # models, logs and scores land here
device=auto nproc=1 seed=42              # device: auto, cuda, musa or cpu; nproc: devices (or CPU processes)
given="corpus moe dense"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/u2pp.sh                   # units, pack, cmvn, {train,average,decode,score,table}_models

if want 0 "corpus -> data/{train,dev,test_net,test_meeting}/{wav.scp,text,utt2spk}"; then
  need corpus "ask for it at https://wenet.org.cn/WenetSpeech"
  py ../local/prepare.py --corpus "$corpus" --out data --subset "$subset"
fi
if want 1 "data/* -> data/units (characters, sentence pieces of English words), data/pack/*, data/am.mvn"; then
  units train --pieces 1000
  pack data/units train dev
  cmvn train data/am.mvn "$moe"
fi
if want 2 "data/pack -> $exp/{moe,dense}"; then
  train_models train dev
fi
if want 3 "$exp/*/checkpoints -> $exp/*/average"; then
  average_models
fi
if want 4 "data/test_{net,meeting} -> $exp/*/decode/*/*/text: full context and chunks, four searches"; then
  decode_models test_net test_meeting
fi
if want 5 "text -> error rates (characters, English words) and RTF in README.md"; then
  score_models mer test_net test_meeting
  table_models wenetspeech test_net test_meeting
fi
