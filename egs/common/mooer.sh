# shellcheck shell=bash
# The steps that recipes of MooER share, one command each:  . ../../common/recipe.sh; . ../../common/mooer.sh

. "${BASH_SOURCE[0]%/*}/steps.sh" # pack, cmvn, train, average, table

# decode MODEL OUT SET:TASK... [++key=value ...]: -> OUT/SET.TASK/text
decode() {
  local model=$1 out=$2 item
  local -a items=() settings=()
  shift 2
  for item in "$@"; do
    case $item in
      ++*) settings+=("$item") ;;
      *) items+=("$item") ;;
    esac
  done
  for item in "${items[@]}"; do
    py decode --model "$model" --data "data/${item%%:*}" --task "${item##*:}" --out "$out/${item/:/.}" \
      --device "$device" --nproc "$nproc" "${settings[@]}"
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
