#!/usr/bin/env bash
# Prints the manifest of a run on GKE (a ConfigMap with CONFIG, and a JobSet), or applies it.
#
#   jobset.sh --name=NAME --image=IMAGE --accelerator=tpu-v6e-slice --topology=4x4 --claim=CLAIM
#             CONFIG [section.key=value ...]
#
#   --claim=CLAIM             a ReadWriteMany volume claim, the disk that all workers share
#   --mount=/mnt/sr_dpo       where it is mounted; output_dir lies below it
#   --chips=4                 chips of one host; with the topology they give the number of hosts in a slice
#   --slices=1                number of node pools of that topology
#   --max-restarts=100        failures that are allowed; most preemptions do not count, but some look like failures
#   --spot                    on spot nodes only
#   --queue=QUEUE             a queue of Kueue; multislice-queue in clusters made by XPK
#   --service-account=NAME    a service account of Kubernetes
#   --token-secret=SECRET     a secret whose key `token` is a Hugging Face token
#   --namespace=default       the namespace of all these
#   --apply                   passes the manifest to kubectl apply
#   --dry-run                 prints the manifest and the command, and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name image accelerator topology claim" \
  "mount chips slices max_restarts queue service_account token_secret namespace" "spot apply" \
  "CONFIG [section.key=value ...]"
mount=/mnt/sr_dpo chips=4 slices=1 max_restarts=100 namespace=default
parse "$@"
eval "set -- $words"
check_training "$@"
printf '%s' "$topology" | grep -Eqx '[1-9][0-9]*(x[1-9][0-9]*)+' ||
  die "--topology: '$topology' is not like 4x4 or 2x2x4"
total=$(($(printf '%s' "$topology" | sed 's/x/ * /g')))
[ $((total % chips)) -eq 0 ] || die "--chips: hosts of $chips do not make up the $total chips of --topology=$topology"
hosts=$((total / chips))
check_length --name "$name" "-slice-job-$((slices - 1))-$((hosts - 1))-xxxxx" # the name of the last pod
config=$1
shift

edits='/^#/d'
fill() { # KEY VALUE ...: replaces {{KEY}} in the template; deletes its lines where the value is empty
  while [ $# -gt 0 ]; do
    edit="/{{$1}}/d"
    [ -z "$2" ] || edit="s|{{$1}}|$(printf '%s' "$2" | sed 's/[\\&|]/\\&/g')|"
    edits="$edits
$edit"
    shift 2
  done
}
fill NAME "$name" NAMESPACE "$namespace" QUEUE "$queue" MAX_RESTARTS "$max_restarts" SLICES "$slices" HOSTS "$hosts"
fill SERVICE_ACCOUNT "$service_account" ACCELERATOR "$accelerator" TOPOLOGY "$topology" SPOT "${spot:+true}"
fill IMAGE "$image" TOKEN_SECRET "$token_secret" CHIPS "$chips" MOUNT "$mount" CLAIM "$claim"
# Last, because an argument may contain text that looks like a key.
fill ARGS "[$(json train /etc/sr_dpo/config.yaml "distributed.processes=$((hosts * slices))" "$@")]"

manifest() {
  sed '/{{CONFIG}}/,$d' "$here/jobset.yaml" | sed "$edits"
  sed 's/^/    /' "$config"
  echo
  sed '1,/{{CONFIG}}/d' "$here/jobset.yaml" | sed "$edits"
}
text=$(manifest)
if [ -z "$apply" ] || [ -n "$dry_run" ]; then printf '%s\n' "$text"; fi
[ -z "$apply" ] || run kubectl apply --filename=- <<END
$text
END
