#!/usr/bin/env bash
# Trains on every worker, and ends with the exit code of sr-dpo train: 0 done, 2 bad usage, 75 preempted, 1 otherwise.
#
#   launch.sh --name=NAME --zone=ZONE --project=PROJECT CONFIG [section.key=value ...]
#
#   --mount=/mnt/sr_dpo   the shared disk, as in setup.sh; output_dir lies below it
#   --processes=N         the number of workers in all; counted by default
#   --tries=3 --poll-s=10 tries of each query to gcloud, and seconds before the second
#   --dry-run             prints the commands and runs none
#
# The run continues when this script or its connection ends; the same command finds it again. stop.sh ends it.
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project" "mount processes tries poll_s" "" "CONFIG [section.key=value ...]"
mount=/mnt/sr_dpo tries=3 poll_s=10
parse "$@"
eval "set -- $words"
check_training "$@"
config=$1
shift

workers() ( # prints the number of workers
  sum=0
  for node in $tpu_nodes; do
    count=$(insist describe 1 tpu-vm "$node" 'networkEndpoints.len()') || exit
    sum=$((sum + count))
  done
  [ -z "$dry_run" ] || sum=N
  printf '%s' "$sum"
)
launch() {
  node=$1
  shift
  upload "$node" "sr_dpo/$copy" "$config" && remote "$node" all bash sr_dpo/worker.sh run "$attempt" "$@"
}

tpu_nodes=$(insist nodes)
[ -n "$processes" ] || processes=$(workers)
copy=config-$(cksum <"$config" | cut -d' ' -f1).yaml # so that worker.sh sees changed contents as another command
attempt=$(date +%s)-$$
note "training on $processes workers; logs.sh follows it"
on_every_node launch sr_dpo/venv/bin/sr-dpo train "sr_dpo/$copy" "distributed.processes=$processes" "$@"
