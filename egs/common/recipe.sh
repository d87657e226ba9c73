# shellcheck shell=bash
# What every run.sh sources after its defaults:  . ../../common/recipe.sh
#
#   --flag value     sets the variable `flag` that run.sh has set before (--stop-stage sets stop_stage); an unknown flag
#                    stops. A variable that is true or false needs no value: --download. --help shows run.sh's header.
#   --dry-run        prints the commands of every stage and runs none of them
#   want N TITLE     logs and answers whether stage N was asked for by --stage and --stop-stage
#   run CMD ...      logs and runs a command, or only prints it
#   py MODULE ...    the same for `python -m funasr_mooer.bin.MODULE ...`, or for a script: py local/prepare.py ...
#   need NAME HINT   stops unless the flag NAME names something that exists (not in a dry run)
#   log, die         a line with the time on stderr; die also stops
#
# run.sh works in its own folder. A path given to a flag listed in `given` (given="corpus llm") means what it means
# in the caller's folder, wherever that is.
#
# PYTHON names the interpreter; without it .venv/bin/python at the repository's root, else python3.

log() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }

die() {
  log "error: $*"
  exit 1
}

want() {
  if ((${stage:?} <= $1 && $1 <= ${stop_stage:?})); then
    log "stage $1: $2"
  else
    return 1
  fi
}

need() {
  if [ "$dry_run" = true ] || [ -e "${!1}" ]; then return; fi
  [ -n "${!1}" ] || die "--${1//_/-} is missing; $2"
  die "--${1//_/-} '${!1}' does not exist; $2"
}

run() {
  if [ "$dry_run" = true ]; then
    quoted "$@"
  else
    quoted "$@" >&2
    "$@"
  fi
}

py() {
  local target=$1
  shift
  case $target in
    *.py) run "$PYTHON" "$target" "$@" ;;
    *) run "$PYTHON" -m "funasr_mooer.bin.$target" "$@" ;;
  esac
}

# The words as a line that can be pasted into a shell; plain words stay plain.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,+@%-]+$ ]] || word=$(printf '%q' "$word")
    line+="$word "
  done
  printf '  %s\n' "${line% }"
}

# --help: run.sh from its second line to the one that sources this file.
_usage() {
  sed -n -e '1d' -e '/^\. .*recipe\.sh/q' -e '/^set -\|^cd /d' -e 's/^# \{0,1\}//' -e p "${0##*/}"
}

_parse_flags() {
  local _flag _name
  while [ $# -gt 0 ]; do
    _flag=$1
    shift
    if [ "$_flag" = --help ] || [ "$_flag" = -h ]; then
      _usage
      exit 0
    fi
    _name=${_flag#--}
    _name=${_name//-/_}
    # Only lower-case names can be flags: the environment's are upper case.
    if [[ $_flag != --* || ! $_name =~ ^[a-z][a-z0-9_]*$ || -z ${!_name+set} ]]; then
      die "unknown flag '$_flag'; ./run.sh --help lists the flags"
    fi
    if [[ ${!_name} =~ ^(true|false)$ && ! ${1:-} =~ ^(true|false)$ ]]; then
      printf -v "$_name" true
    elif [ $# -eq 0 ]; then
      die "$_flag needs a value"
    else
      printf -v "$_name" '%s' "$1"
      shift
    fi
  done
}

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x "$_root/.venv/bin/python" ]; then PYTHON=$_root/.venv/bin/python; fi
fi
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}" # a checkout works before it is installed

dry_run=false
# shellcheck disable=SC2034 # read by run.sh
nj=$(getconf _NPROCESSORS_ONLN) # processes that prepare and pack data
_parse_flags "$@"
for _name in ${given:-}; do
  _path=${!_name}
  # A relative path that is not there stays as it is: it may be the id of a model on a hub.
  if [[ $_path && $_path != /* && -e $OLDPWD/$_path ]]; then printf -v "$_name" '%s' "$OLDPWD/$_path"; fi
done
for _name in stage stop_stage nproc nj; do
  [[ ${!_name} =~ ^[0-9]+$ ]] || die "--${_name//_/-} '${!_name}' is not a number"
done
