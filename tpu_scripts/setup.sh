#!/usr/bin/env bash
# Installs sr_dpo_jax on every worker of a TPU and mounts a disk that they share. It can be run again at any time.
#
#   setup.sh --name=NAME --zone=ZONE --project=PROJECT --package=WHEEL
#
#   --package=WHEEL        made with: pip wheel --no-deps --wheel-dir=dist .
#   --share=SHARE          gs://BUCKET (through gcsfuse) or HOST:/PATH (NFS); without it, mount one yourself
#   --mount=/mnt/sr_dpo    where the disk is mounted
#   --token-file=FILE      a Hugging Face token for the workers; the token appears in no command
#   --python=3.12          the Python to install
#   --tries=3 --poll-s=10  tries, and seconds before the second
#   --dry-run              prints the commands and runs none
set -euo pipefail
. "$(dirname "$0")/common.sh"
options "name zone project package" "share mount token_file python tries poll_s" ""
mount=/mnt/sr_dpo python=3.12 tries=3 poll_s=10
parse "$@"
case $package in *.whl) ;; *) die "--package: '$package' is not a wheel; --help tells how to make one" ;; esac
case $share in
  '' | ?*:/[!/]*) ;;
  gs://*/* | gs://) die "--share: '$share' is not a bucket; write gs://BUCKET" ;;
  gs://*) ;;
  *) die "--share: '$share' is neither gs://BUCKET nor HOST:/PATH" ;;
esac

setup() {
  remote "$1" all mkdir -p sr_dpo .cache/huggingface &&
    upload "$1" sr_dpo/ "$here/worker.sh" "$here/worker_setup.sh" "$package" &&
    { [ -z "$token_file" ] || upload "$1" .cache/huggingface/token "$token_file"; } &&
    remote "$1" all bash sr_dpo/worker_setup.sh "${package##*/}" "$python" ${share:+"$share" "$mount"}
}

tpu_nodes=$(insist nodes)
insist on_every_node setup
