#!/usr/bin/env bash
# Installs the wheel beside it and mounts the shared disk. setup.sh copies this file to the workers and runs it there.
#
#   worker_setup.sh WHEEL PYTHON [SHARE MOUNT]
set -euo pipefail
trap '[ $? -eq 0 ] || exit 1' EXIT # installers end with 2 too, which setup.sh would take for bad usage
cd "$HOME"
PATH=$HOME/.local/bin:$PATH
wheel=$1 python=$2 share=${3-} mount=${4-}
[ ! -f .cache/huggingface/token ] || chmod 600 .cache/huggingface/token

if [ -n "$share" ] && ! mountpoint -q "$mount"; then
  sudo mkdir -p "$mount"
  case $share in
    gs://*)
      command -v gcsfuse >/dev/null || sudo apt-get install --yes gcsfuse || {
        echo "gcsfuse: is not among the package sources here; add it as its manual says, or share a disk by NFS" >&2
        exit 1
      }
      sudo chown "$(id -u):$(id -g)" "$mount"
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        "${share#gs://}" "$mount" # so that a worker sees at once what another has written
      ;;
    *)
      command -v mount.nfs >/dev/null || { sudo apt-get update && sudo apt-get install --yes nfs-common; }
      sudo mount -t nfs -o lookupcache=positive "$share" "$mount"
      [ -w "$mount" ] || sudo chown "$(id -u):$(id -g)" "$mount"
      ;;
  esac
fi
printf '%s' "$mount" >sr_dpo/mount # worker.sh starts nothing while it is not mounted

command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[ -x sr_dpo/venv/bin/python ] || uv venv --quiet --python "$python" sr_dpo/venv
uv pip install --quiet --python sr_dpo/venv/bin/python --reinstall-package sr-dpo-jax \
  "sr_dpo_jax[tpu] @ file://$HOME/sr_dpo/$wheel"
