#!/usr/bin/env bash
# CORPUS, LANGUAGE speech recognition with MooER. Every stage can be rerun alone.
#   cp -r egs/TEMPLATE egs/CORPUS              # then write local/prepare.py, and make this header true
#   ./run.sh --corpus /data/CORPUS --llm /models/Qwen2-7B-Instruct --encoder /models/paraformer-large
#   ./run.sh --stage 4 --exp exp/other         # decode and score another run
set -euo pipefail
cd "$(dirname "$0")"

stage=0 stop_stage=5
corpus=                                  # where CORPUS is unpacked
llm=                                     # folder of the language model, with its tokenizer
encoder=                                 # folder of Paraformer-large as FunASR ships it: model.pt, am.mvn
config=../../../conf/mooer_paraformer_qwen2_7b.yaml
exp=exp/mooer                            # checkpoints, logs and scores land here
average_n=5                              # best checkpoints to average
tests=(test:asr)                         # SET:TASK to decode; a translation corpus adds test:ast
metric=cer                               # cer, wer, mer, or bleu for translation
device=auto nproc=1 seed=42              # device: auto, cuda, musa or cpu; nproc: devices (or CPU processes)
given="corpus llm encoder config"        # flags that are paths in the caller's folder
. ../../common/recipe.sh                 # --flags, want, need, run, py, log, die
. ../../common/mooer.sh                  # pack, train, average, decode, score, table

if want 0 "corpus -> data/{train,dev,test}/{wav.scp,text,utt2spk}"; then
  need corpus "say where to download it"
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
if want 4 "data/test -> $exp/decode/*/text"; then
  decode "$exp/average" "$exp/decode" "${tests[@]}"
fi
if want 5 "text -> a table in README.md"; then
  score "$exp/decode" "${exp##*/}" "${tests[@]/%/:$metric}"
  table README.md results "$exp"/decode/*/result.json
fi
