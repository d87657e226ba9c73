# shellcheck shell=bash
# The steps that recipes of MooER share, one command each:  . ../../common/recipe.sh; . ../../common/mooer.sh
#
# Data sets are names under data/: the Kaldi directory data/NAME, packed as data/pack/NAME. From run.sh these steps
# read $device, $nproc and $seed, from recipe.sh $nj. Each reads what the step before wrote, and writes it whole or not at all.

: "${device:?run.sh must set it}" "${nproc:?run.sh must set it}" "${nj:?}" "${seed:?run.sh must set it}"

# pack TOKENIZER SET...: Kaldi directories -> shards with an index and tokens
pack() {
  local tokenizer=$1 set
  shift
  for set in "$@"; do
    py pack --data "data/$set" --out "data/pack/$set" --tokenizer "$tokenizer" --nj "$nj"
  done
}

# cmvn SET FILE: pack -> mean and variance of the features, am.mvn
cmvn() {
  py cmvn --pack "data/pack/$1" --out "$2"
}

# train CONFIG EXP TRAIN_SETS DEV_SET [++key=value ...]: packs -> EXP/best; goes on where it was interrupted
train() {
  local config=$1 exp=$2 sets=$3 dev=$4 set
  local -a packs=()
  shift 4
  for set in $sets; do
    case $set in
      */*) packs+=("$set") ;; # another recipe's pack
      *) packs+=("data/pack/$set") ;;
    esac
  done
  py train --config "$config" --exp "$exp" --train "${packs[@]}" --dev "data/pack/$dev" \
    --device "$device" --nproc "$nproc" "++train_conf.seed=$seed" "$@"
}

# average EXP N: the N best checkpoints -> EXP/average
average() {
  py average --exp "$1" --num "$2" --out "$1/average"
}

# decode MODEL OUT SET:TASK...: -> OUT/SET.TASK/text
decode() {
  local model=$1 out=$2 item
  shift 2
  for item in "$@"; do
    py decode --model "$model" --data "data/${item%%:*}" --task "${item##*:}" --out "$out/${item/:/.}" \
      --device "$device" --nproc "$nproc"
  done
}

# score OUT NAME SET:TASK:METRIC...: OUT/SET.TASK/text against the references -> OUT/SET.TASK/result.json
score() {
  local out=$1 name=$2 item set task metric ref
  shift 2
  for item in "$@"; do
    IFS=: read -r set task metric <<<"$item"
    ref=data/$set/text
    if [ "$task" = ast ]; then ref=data/$set/text.en; fi
    py score compute --ref "$ref" --hyp "$out/$set.$task/text" --metric "$metric" \
      --name "$name, $set $task" --meta "set=$set" "task=$task" "seed=$seed" --out "$out/$set.$task/result.json"
  done
}

# table README BLOCK RESULT.json...: results -> a table in the README between the marks of that block
table() {
  local readme=$1 block=$2
  shift 2
  py score table "$@" --markdown "$readme" --block "$block"
}
