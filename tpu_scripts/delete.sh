#!/usr/bin/env bash
# Deletes a queued resource and its TPUs with everything on their own disks; the shared disk stays. It also succeeds if
# there is no such resource.
#
#   delete.sh --name=NAME --zone=ZONE --project=PROJECT
#
#   --dry-run   prints the command and does not run it
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project" "" ""
parse "$@"
give_back
