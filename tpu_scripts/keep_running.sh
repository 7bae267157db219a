#!/usr/bin/env bash
# Creates a TPU, sets it up and launches the run, again after every preemption, until the run is done.
#
#   keep_running.sh --name=NAME --zone=ZONE --project=PROJECT --accelerator-type=TYPE --runtime-version=VERSION
#                   --package=WHEEL CONFIG [section.key=value ...]
#
#   --slices --spot --reserved --service-account --valid-until-duration   as in create.sh
#   --share --mount --token-file --python                                 as in setup.sh
#   --tries=5 --poll-s=30   failures in a row after which it gives up, and seconds before the second try
#   --delete-when-done      deletes the TPU at the end, however the run ended; warns if that fails
#   --dry-run               prints the commands of one round and runs none
#
# Ends with 0 when the run is done, at once with 2 (bad usage or config), with the last code after too many failures.
# A preemption (75, or a TPU that is gone) is no failure. If interrupted, it leaves the run alone, and finds it again.
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project accelerator_type runtime_version package" \
  "slices service_account valid_until_duration share mount token_file python tries poll_s" \
  "spot reserved delete_when_done" "CONFIG [section.key=value ...]"
slices=1 mount=/mnt/sr_dpo python=3.12 tries=5 poll_s=30
parse "$@"
eval "set -- $words"
check_training "$@"

script() { # NAME [WORD...]
  path=$here/$1.sh
  shift
  "$path" --name="$name" --zone="$zone" --project="$project" ${dry_run:+--dry-run} "$@"
}
round() { # CONFIG [section.key=value ...]
  given=''
  script create --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" --slices="$slices" \
    ${spot:+--spot} ${reserved:+--reserved} ${service_account:+--service-account="$service_account"} \
    ${valid_until_duration:+--valid-until-duration="$valid_until_duration"} \
    --tries="$tries" --poll-s="$poll_s" || return
  given=yes
  script setup --package="$package" --python="$python" ${share:+--share="$share"} --mount="$mount" \
    ${token_file:+--token-file="$token_file"} --tries=1 || return
  script launch --mount="$mount" --poll-s="$poll_s" "$@"
}
finish() { # CODE
  [ -z "$delete_when_done" ] || insist script delete ||
    note "--delete-when-done: $name could not be deleted and may still cost; run delete.sh"
  exit "$1"
}

failures=0
while :; do
  code=0
  round "$@" || code=$?
  case $code in 0 | 2) finish "$code" ;; esac
  now=$(insist state) || finish $?
  if [ "$code" -eq 75 ] || { [ -n "$given" ] && [ "$now" != ACTIVE ]; }; then
    failures=0
    note "preempted: the run ended with $code, $name is $now; going on"
  else
    failures=$((failures + 1))
    [ "$failures" -lt "$tries" ] || finish "$code"
    note "failed with $code, $failures of $tries times; again"
  fi
  pause "$failures"
done
