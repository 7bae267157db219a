#!/usr/bin/env bash
# Prints the end of a worker's log, or follows it.
#
#   logs.sh --name=NAME --zone=ZONE --project=PROJECT
#
#   --slice=0 --worker=0   the worker; worker 0 of slice 0 also logs the progress
#   --lines=50             number of lines
#   --follow               continues until interrupted, which leaves the run alone
#   --dry-run              prints the commands and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project" "slice worker lines" "follow"
slice=0 worker=0 lines=50
parse "$@"

tpu_nodes=$(nodes)
node=$(printf '%s\n' "$tpu_nodes" | sed -n "$((slice + 1))p")
[ -n "$node" ] || die "--slice: there is no slice $slice; the TPUs are $(printf '%s' "$tpu_nodes" | tr '\n' ' ')"
remote "$node" "$worker" tail -n "$lines" ${follow:+-F} sr_dpo/run/log
