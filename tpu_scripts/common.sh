# shellcheck shell=sh disable=SC2034 # what seems unused here is read by the scripts
# Functions that the scripts share: arguments, --dry-run, and calls of gcloud. This file is sourced, never run.

here=$(dirname "$0") dry_run='' words='' tpu_nodes=''
exec 3>&1 # --dry-run prints here, also from where a script reads a command's output

# Every option. A script names those that it takes, and sets its defaults; nothing comes from the environment.
name='' zone='' project='' accelerator_type='' runtime_version='' slices='' spot='' reserved='' service_account=''
valid_until_duration='' package='' share='' mount='' token_file='' python='' processes='' slice='' worker='' lines=''
follow='' delete_when_done='' image='' accelerator='' topology='' claim='' chips='' max_restarts='' queue=''
token_secret='' namespace='' apply='' tries='' poll_s=''

note() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

die() {
  note "$1"
  exit 2
}

quote() ( # prints the words quoted for a shell
  space=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    printf '%s%s' "$space" "$word"
    space=' '
  done
)

json() ( # prints the words as the items of a JSON list
  comma=''
  for word in "$@"; do
    printf '%s"%s"' "$comma" "$(printf '%s' "$word" | sed 's/\\/\\\\/g; s/"/\\"/g')"
    comma=', '
  done
)

# Arguments

options() { # NEEDED TAKEN FLAGS [OPERANDS]: the options that a script takes, by the names of their variables
  needed=$1 taken=$2 flags=$3 operands=${4-}
}

parse() { # sets the variables, and `words` to the operands, quoted for eval
  while [ $# -gt 0 ]; do
    case $1 in
      *[[:cntrl:]]*) die "an argument holds a line break or another control character; remove it" ;;
      --help)
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --dry-run) dry_run=--dry-run ;;
      -*=*) set_option "${1%%=*}" "${1#*=}" ;;
      -*)
        if is_in "$flags" "$1"; then
          eval "$(variable_of "$1")=\$1"
        else
          [ $# -gt 1 ] || die "$1: has no value, or is no option; --help lists them"
          set_option "$1" "$2"
          shift
        fi
        ;;
      *)
        [ -n "$operands" ] || die "'$1': is not an option, and this script takes nothing else; --help lists them"
        words="$words $(quote "$1")"
        ;;
    esac
    shift
  done
  for variable in $needed; do
    eval "[ -n \"\$$variable\" ]" || die "--$(printf '%s' "$variable" | tr _ -): is missing; --help tells what it is"
  done
}

variable_of() { printf '%s' "${1#--}" | tr - _; }

is_in() { # VARIABLES OPTION
  case $2 in *[!a-z-]*) return 1 ;; esac
  case " $1 " in *" $(variable_of "$2") "*) ;; *) return 1 ;; esac
}

set_option() { # OPTION VALUE
  is_in "$needed $taken" "$1" || die "$1: no such option; --help lists them"
  case $2 in '' | -*) die "$1: '$2' is not a value; give one that does not begin with a dash" ;; esac
  why=''
  case $1 in
    --package | --token-file) [ -f "$2" ] || why='not a file; name one that exists' ;;
    --mount) case $2 in *[!A-Za-z0-9._/-]* | [!/]* | */ | *..*) why='not a directory like /mnt/sr_dpo' ;; esac ;;
    --name | --namespace | --zone | --queue | --claim | --token-secret)
      case $2 in [!a-z]* | *[!a-z0-9-]* | *-) why='not a name; use a-z, 0-9 and -, a letter first' ;; esac ;;
    --lines | --max-restarts | --poll-s | --slice)
      case $2 in *[!0-9]* | 0?* | ???????*) why='not a whole number; give one' ;; esac ;;
    --chips | --processes | --slices | --tries)
      case $2 in *[!0-9]* | 0* | ???????*) why='not a whole number above 0; give one' ;; esac ;;
    *) case $2 in *[!A-Za-z0-9._:/@-]*) why='not possible here; use letters, digits and ._:/@-' ;; esac ;;
  esac
  [ -z "$why" ] || die "$1: '$2' is $why"
  case $1 in --name | --namespace | --queue) check_length "$1" "$2" '' ;; esac
  eval "$(variable_of "$1")=\$2"
}

check_length() { # OPTION NAME SUFFIX: names are used as labels, and a label has 63 letters at most
  both=$2$3
  [ "${#both}" -le 63 ] || die "$1: '$2' is too long; a name has 63 letters at most${3:+, and $3 is appended to it}"
}

check_training() { # CONFIG [section.key=value ...]: refuses settings that would fail on the workers or lose the run
  [ $# -gt 0 ] || die "CONFIG: is missing; name the YAML file of the run"
  [ -f "$1" ] || die "CONFIG: '$1' is not a file; name the YAML file of the run"
  output_dir=$(setting output_dir "$1") cache_dir=$(setting cache_dir "$1") model_path=$(model_of "$1")
  shift
  for word in "$@"; do
    case $word in
      distributed.processes=*) die "$word: is set by this script; remove it" ;;
      output_dir=*) output_dir=${word#*=} ;;
      cache_dir=*) cache_dir=${word#*=} ;;
      model.path=*) model_path=${word#*=} ;;
      [a-z]*=*) ;;
      *) die "'$word': is not of the form section.key=value" ;;
    esac
  done
  check_shared output_dir "${output_dir:-?}" 'a new TPU would not find the run again'
  case $cache_dir in
    '' | null | '~') ;; # it lies in output_dir then
    *) check_shared cache_dir "$cache_dir" 'process 0 alone fills it, so a new TPU would score the reference again' ;;
  esac
  check_model "$model_path"
}

setting() { # KEY CONFIG: prints the value of a top-level `KEY: value` line; `?` where KEY is written in another way
  if grep -q "^$1:" "$2"; then
    sed -n "s/^$1: *[\"']\{0,1\}\(\([^\"' #][^\"' ]*\)\{0,1\}\).*/\1/p" "$2"
  elif grep -q "^[^#]*$1" "$2"; then
    printf '?'
  fi
}

model_of() { # CONFIG: prints `path` of the section `model:`, indented or in braces; nothing if written otherwise
  sed -n '/^model:/,/^[^ #]/{
    s/^ \{1,\}path: *//p
    s/^model: *{\(.*[, ]\)\{0,1\}path: *//p
  }' "$1" | sed "s/^[\"']//; s/[\"', }].*//"
}

check_shared() { # KEY PATH REASON
  case $2 in
    '?') die "$1: stands in no plain line '$1: PATH' of CONFIG, as these scripts read it; write one, or add $1=PATH" ;;
    .. | ../* | */../* | */..) die "$1: '$2' leads elsewhere by its '..'; write the path without" ;;
    "$mount"/*) ;;
    *) die "$1: '$2' is not below $mount, the disk that all workers share; $3.
Set $1=$mount/DIRECTORY (sr-dpo writes to mounted disks only, not to gs:// addresses), or --mount" ;;
  esac
}

check_model() { # PATH: accepts names of the hub and directories that the workers have
  case $1 in
    '') return ;; # not readable here; on the workers sr-dpo names the error
    .. | */../* | */..) ;;
    "$mount"/*) return ;;
    /*) [ -z "$image" ] || return 0 ;; # an image may contain it; a new TPU has an empty disk
    .* | '~'* | */*/* | models/*) ;;   # the hub has no owner `models`
    *) [ -e "$1" ] || return 0 ;;
  esac
  die "model.path: '$1' is a directory, and not below $mount, the disk that all workers share; they would not find it.
Export or copy the model to there, and set model.path=$mount/MODEL; for a hub name, leave the directory where it exists"
}

# Commands

run() { # COMMAND...: runs the command, or prints it in --dry-run; every command that reaches another machine goes here
  if [ -n "$dry_run" ]; then printf '+ %s\n' "$(quote "$@")" >&3; else "$@"; fi
}

ask() { # ANSWER COMMAND...: prints the command's output; in --dry-run, ANSWER
  answer=$1
  shift
  run "$@" || return
  [ -z "$dry_run" ] || printf '%s\n' "$answer"
}

tpus() { # COMMAND...: runs gcloud compute tpus COMMAND in the project and the zone
  run gcloud compute tpus "$@" --project="$project" --zone="$zone" --quiet
}

insist() ( # COMMAND...: repeats it until it succeeds, at most $tries times; exit code 2 (bad usage) is final
  failures=0
  while :; do
    code=0
    "$@" || code=$?
    failures=$((failures + 1))
    case $code in 0 | 2) exit "$code" ;; esac
    [ "$failures" -lt "$tries" ] || exit "$code"
    note "failed with $code, $failures of $tries times; again"
    pause "$failures"
  done
)

pause() { # FAILURES: sleeps $poll_s seconds after none or one, then twice as long each time, up to 16 times as long
  doublings=$(($1 < 1 ? 0 : $1 > 5 ? 4 : $1 - 1))
  sleep "$((poll_s << doublings))"
}

# A queued resource and its TPUs, one for each slice

describe() { # ANSWER KIND NAME FIELD: prints the field; in --dry-run, ANSWER
  ask "$1" gcloud compute tpus "$2" describe "$3" --format="value($4)" --project="$project" --zone="$zone"
}

state() ( # [ANSWER]: prints NONE if there is no such queued resource, PREEMPTED if one of its TPUs is gone
  found=$(or_absent NONE describe "${1-ACTIVE}" queued-resources "$name" state.state) || exit
  if [ "$found" = ACTIVE ]; then
    members=$(nodes) || exit
    for node in $members; do
      health=$(or_absent PREEMPTED describe READY tpu-vm "$node" state) || exit
      case $health in PREEMPTED | TERMINATED) found=PREEMPTED ;; esac
    done
  fi
  printf '%s\n' "$found"
)

or_absent() ( # ABSENT COMMAND...: prints the command's output, or ABSENT if gcloud reports NOT_FOUND
  absent=$1 code=0
  shift
  errors=$(mktemp)
  found=$("$@" 2>"$errors") || code=$?
  if [ "$code" -ne 0 ] && grep -q NOT_FOUND "$errors"; then found=$absent code=0; else cat "$errors" >&2; fi
  rm -f "$errors"
  [ -z "$found" ] || printf '%s\n' "$found"
  exit "$code"
)

give_back() { # deletes the queued resource and its TPUs
  or_absent "$name is not there" tpus queued-resources delete "$name" --force
}

nodes() ( # prints the names of the TPUs
  found=$(describe "$name" queued-resources "$name" 'tpu.nodeSpec[].nodeId') || exit
  if [ -z "$found" ]; then
    note "queued resource $name names no TPU; status.sh shows it"
    exit 1
  fi
  printf '%s\n' "$found" | tr ';' '\n'
)

on_every_node() ( # FUNCTION [WORD...]: runs FUNCTION NODE WORD... for all at once; ends with 2, else 75, else another
  jobs='' gravest=0 function=$1
  shift
  for node in $tpu_nodes; do
    "$function" "$node" "$@" &
    jobs="$jobs $!"
  done
  for job in $jobs; do
    code=0
    wait "$job" || code=$?
    case $gravest,$code in *,0 | 2,*) ;; 0,* | *,2 | *,75) gravest=$code ;; esac
  done
  exit "$gravest"
)

remote() { # NODE WORKERS WORD...: runs the words as one command on these workers
  node=$1 workers=$2
  shift 2
  tpus tpu-vm ssh "$node" --worker="$workers" --command="$(quote "$@")" \
    --ssh-flag=-oBatchMode=yes --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=30
}

upload() { # NODE TARGET FILE...: copies the files to all workers
  node=$1 target=$2
  shift 2
  tpus tpu-vm scp "$@" "$node:$target" --worker=all --scp-flag=-oBatchMode=yes --scp-flag=-oConnectTimeout=15
}
