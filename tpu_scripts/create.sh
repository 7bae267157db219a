#!/usr/bin/env bash
# Requests a TPU with a queued resource, and waits until it is granted. A failed request is made again, --tries times in
# a row at most, because a wrong quota or type fails each time.
#
#   create.sh --name=NAME --zone=ZONE --project=PROJECT --accelerator-type=TYPE --runtime-version=VERSION
#
#   --slices=1                  the number of TPUs of that type in the pod, named NAME, or NAME-0, NAME-1, ...
#   --spot                      capacity that may be taken back at any moment; or
#   --reserved                  capacity of your reservation; the default is on-demand capacity
#   --service-account=EMAIL     the account with whose rights the workers act
#   --valid-until-duration=6h   how long one request may wait before it fails
#   --tries=5 --poll-s=30       failures in a row after which it gives up, and seconds between checks
#   --dry-run                   prints the commands and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project accelerator_type runtime_version" \
  "slices service_account valid_until_duration tries poll_s" "spot reserved"
slices=1 tries=5 poll_s=30
parse "$@"
check_length --name "$name" "$([ "$slices" -eq 1 ] || printf '%s' "-$((slices - 1))")"
[ -z "$spot" ] || [ -z "$reserved" ] || die "--spot, --reserved: exclude each other; give one"

request() (
  if [ "$slices" -gt 1 ]; then set -- --node-count="$slices" --node-prefix="$name"; else set -- --node-id="$name"; fi
  code=0
  tpus queued-resources create "$name" "$@" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" ${spot:+--spot} ${reserved:+--reserved} \
    ${service_account:+--service-account="$service_account"} \
    ${valid_until_duration:+--valid-until-duration="$valid_until_duration"} || code=$?
  case $code in 0 | 2) exit "$code" ;; esac
  if now=$(state) && [ "$now" != NONE ]; then exit 0; fi # the request was made, only its answer was lost
  exit "$code"
)

before='' requests=0 # made in a row; all but the last have failed
while :; do
  now=$(insist state NONE)
  [ "$now" = "$before" ] || [ -n "$dry_run" ] || note "$name: $now"
  before=$now
  case $now in
    ACTIVE) exit 0 ;;
    NONE)
      insist request
      requests=$((requests + 1))
      ;;
    FAILED)
      why=$(insist describe '' queued-resources "$name" state.failedData.error.message)
      note "the request has failed: ${why:-no reason is given}"
      insist give_back
      if [ "$requests" -ge "$tries" ]; then
        note "$requests requests in a row have failed; correct what the messages name, or ask again later"
        exit 1
      fi
      pause "$requests"
      continue
      ;;
    SUSPENDED | PREEMPTED)
      insist give_back
      requests=0
      ;;
  esac
  [ -z "$dry_run" ] || exit 0
  sleep "$poll_s"
done
