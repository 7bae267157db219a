#!/usr/bin/env bash
# Asks for a TPU with a queued resource, and waits until it is given. A request that fails is made again.
#
#   create.sh --name=NAME --zone=ZONE --project=PROJECT --accelerator-type=TYPE --runtime-version=VERSION
#
#   --slices=1                  how many TPUs of that type make up the pod; they are NAME, or NAME-0, NAME-1, ...
#   --spot                      capacity that may be taken back at any moment; or
#   --reserved                  capacity of your reservation; without either, on demand
#   --service-account=EMAIL     whose rights the workers have
#   --valid-until-duration=6h   how long one request may wait before it fails
#   --tries=5 --poll-s=30       how often a failing gcloud is run again, and seconds between looks
#   --dry-run                   prints the commands and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project accelerator_type runtime_version" \
  "slices service_account valid_until_duration tries poll_s" "spot reserved"
slices=1 tries=5 poll_s=30
parse "$@"
[ -z "$spot" ] || [ -z "$reserved" ] || die "--spot, --reserved: exclude each other; give one"

request() {
  if [ "$slices" -gt 1 ]; then set -- --node-count="$slices" --node-prefix="$name"; else set -- --node-id="$name"; fi
  tpus queued-resources create "$name" "$@" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" ${spot:+--spot} ${reserved:+--reserved} \
    ${service_account:+--service-account="$service_account"} \
    ${valid_until_duration:+--valid-until-duration="$valid_until_duration"}
}

before=''
while :; do
  now=$(insist state NONE)
  [ "$now" = "$before" ] || [ -n "$dry_run" ] || note "$name: $now"
  before=$now
  case $now in
    ACTIVE) exit 0 ;;
    NONE) insist request ;;
    FAILED | SUSPENDED | PREEMPTED)
      [ "$now" != FAILED ] || insist describe '' queued-resources "$name" state.failedData.error.message >&2
      insist tpus queued-resources delete "$name" --force
      ;;
  esac
  [ -z "$dry_run" ] || exit 0
  sleep "$poll_s"
done
