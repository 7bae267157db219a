#!/usr/bin/env bash
# Ends the run on every worker: the step in flight is saved, and the same launch.sh resumes from it. The TPU stays and
# costs; delete.sh deletes it. Stop keep_running.sh first, or it launches the run again.
#
#   stop.sh --name=NAME --zone=ZONE --project=PROJECT
#
#   --dry-run   prints the commands and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project" "" ""
parse "$@"

stop() { remote "$1" all bash sr_dpo/worker.sh stop; }

tpu_nodes=$(nodes)
on_every_node stop
