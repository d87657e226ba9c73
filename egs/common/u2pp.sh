# shellcheck shell=bash
# The steps that recipes of U2++ share, one command each:  . ../../common/recipe.sh; . ../../common/u2pp.sh
#
# A recipe trains one or two models from the same data: $models names them, "moe dense", "moe" or "dense". Of model NAME
# the config is in $NAME, how many updates it makes in $NAME_steps (empty: as the config says), everything else under
# $exp/NAME; $exp/NAME/average is what is decoded.

. "${BASH_SOURCE[0]%/*}/steps.sh" # pack, cmvn, train, average, table

: "${exp:?run.sh must set it}" "${models:?run.sh must set it}" "${average_n:?run.sh must set it}"
: "${moe:?run.sh must set it}" "${dense:?run.sh must set it}" "${moe_steps?}" "${dense_steps?}" # read by name below
sweep=${_root:?}/conf/decode/u2pp_moe_sweep.yaml # full context and chunks, by four searches
# What a small model wants to leave CTC's plateau: one process makes updates as large as two would.
as_two=++train_conf.accum_grad=$((${nproc:?run.sh must set it} == 1 ? 2 : 1))
# shellcheck disable=SC2034 # some recipes use it
readonly as_two
for _name in $models; do
  [[ $_name == moe || $_name == dense ]] || die "--models '$models': name moe, dense or both"
done

# units SET [--words | --pieces N]: texts -> data/units/units.txt, characters by default
units() {
  local set=$1
  shift
  py units --data "data/$set" --out data/units/units.txt "$@"
}

# train_models TRAIN_SETS DEV_SET [++key=value ...]: packs -> $exp/NAME for each model
train_models() {
  local sets=$1 dev=$2 name steps
  shift 2
  for name in $models; do
    steps=${name}_steps
    train "${!name}" "$exp/$name" "$sets" "$dev" "++tokenizer_conf.init=data/units" \
      "++frontend_conf.cmvn_file=data/am.mvn" ${!steps:+"++train_conf.max_steps=${!steps}"} "$@"
  done
}

# average_models: the $average_n best checkpoints of each model (the last ones if $average_by is last) -> $exp/NAME/average
average_models() {
  local name
  for name in $models; do
    average "$exp/$name" "$average_n" "${average_by:-best}"
  done
}

# decode_models SET...: each model, on each set, in every row and column of the sweep -> $exp/NAME/decode/SET/ROW.COLUMN
decode_models() {
  local name set
  for name in $models; do
    for set in "$@"; do
      py decode --model "$exp/$name/average" --data "data/$set" --out "$exp/$name/decode/$set" --sweep "$sweep" \
        --device "$device" --nproc "$nproc"
    done
  done
}

# score_models METRIC SET...: against the references -> result.json beside each text
score_models() {
  local metric=$1 name set
  shift
  for name in $models; do
    for set in "$@"; do
      py score sweep --ref "data/$set/text" --hyp "$exp/$name/decode/$set"/*/text --metric "$metric" \
        --name "$name, seed $seed" --meta "set=$set" "seed=$seed"
    done
  done
}

# table_models BLOCK SET...: one table of all models and sets, also in README.md
table_models() {
  local block=$1 name set
  local -a results=()
  shift
  for name in $models; do
    for set in "$@"; do
      results+=("$exp/$name/decode/$set"/*/result.json)
    done
  done
  table README.md "$block" --sweep "${results[@]}"
}
