#!/usr/bin/env bash
# AISHELL-1, Mandarin speech recognition with MooER. Every stage can be rerun alone.
#   ./run.sh --corpus /data/data_aishell --llm /models/Qwen2-7B-Instruct --encoder /models/paraformer-large
#   ./run.sh --stage 2 --llm /models/Qwen2-7B-Instruct --encoder /models/paraformer-large --exp exp/seed1 --seed 1
#   ./run.sh --stage 4 --exp exp/seed1                                   # decode and score that run again
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=                                  # data_aishell, unpacked: wav/ and transcript/
llm=                                     # folder of the language model, with its tokenizer
encoder=                                 # folder of Paraformer-large as FunASR ships it: model.pt, am.mvn
config=../../../conf/mooer_paraformer_qwen2_7b.yaml
exp=exp/mooer                            # checkpoints, logs and scores land here
average_n=5                              # best checkpoints to average
device=auto nproc=1 seed=42              # device: auto, cuda, musa or cpu; nproc: devices (or CPU processes)
given="corpus llm encoder config"
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/mooer.sh                  # pack, train, average, decode, score, table

if want 0 "corpus -> data/{train,dev,test}/{wav.scp,text,utt2spk}"; then
  need corpus "unpack https://www.openslr.org/33 there"
  py ../local/prepare.py --corpus "$corpus" --out data
fi
if want 1 "data/* -> data/pack/*: shards, index, tokens"; then
  need llm "give the folder of Qwen2-7B-Instruct or a relative"
  pack "$llm" train dev
fi
if want 2 "data/pack -> $exp/best: train adapter and LoRA"; then
  need encoder "give the folder of Paraformer-large (modelscope download iic/speech_paraformer-large_asr_nat-zh-cn-16k-common-vocab8404-pytorch)"
  train "$config" "$exp" train dev "++llm_conf.init=$llm" "++tokenizer_conf.init=$llm" \
    "++encoder_conf.init=$encoder/model.pt" "++frontend_conf.cmvn_file=$encoder/am.mvn"
fi
if want 3 "$exp/checkpoints -> $exp/average"; then
  average "$exp" "$average_n"
fi
if want 4 "data/test -> $exp/decode/test.asr/text"; then
  decode "$exp/average" "$exp/decode" test:asr
fi
if want 5 "text -> CER in README.md"; then
  score "$exp/decode" "${exp##*/}" test:asr:cer
  table README.md aishell "$exp/decode/test.asr/result.json"
fi
