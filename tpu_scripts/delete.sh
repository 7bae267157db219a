#!/usr/bin/env bash
# Gives a queued resource and its TPUs back, and all that is on their own disks; the shared disk stays. What is not
# there counts as given back.
#
#   delete.sh --name=NAME --zone=ZONE --project=PROJECT
#
#   --dry-run   prints the command and does not run it
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project" "" ""
parse "$@"
give_back
