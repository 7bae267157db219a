#!/usr/bin/env bash
# Shows the state of a queued resource, of its TPUs, and of the run on each worker.
#
#   status.sh --name=NAME --zone=ZONE --project=PROJECT
#
#   --dry-run   prints the commands and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project" "" ""
parse "$@"

show() { remote "$1" all bash sr_dpo/worker.sh status; }

now=$(state)
printf '%s: %s\n' "$name" "$now"
[ "$now" = ACTIVE ] || exit 0
tpu_nodes=$(nodes)
on_every_node show
