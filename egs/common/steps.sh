# shellcheck shell=bash
# The steps that recipes of both systems share, one command each; mooer.sh and u2pp.sh source this file.
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

# cmvn SET FILE [CONFIG]: pack -> mean and variance of the features, am.mvn
cmvn() {
  py cmvn --pack "data/pack/$1" --out "$2" ${3:+--config "$3"}
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

# average EXP N [best | last]: the N best checkpoints, or the N last ones -> EXP/average
average() {
  py average --exp "$1" --num "$2" --by "${3:-best}" --out "$1/average"
}

# table README BLOCK RESULT.json...: results -> a table in the README between the marks of that block
table() {
  local readme=$1 block=$2
  shift 2
  py score table "$@" --markdown "$readme" --block "$block"
}
