#!/usr/bin/env bash
# Runs one training run at a time, which outlives the connection that started it. setup.sh copies this file to workers.
#
#   worker.sh run ATTEMPT COMMAND...   starts the command, or finds it running; waits, and ends with its exit code
#   worker.sh stop                     lets the run save the step in flight, and waits for its end
#   worker.sh status                   prints whether it runs, and the last line of its log
#
# gcloud repeats a command when its connection breaks. The run holds the lock while it lives, so the repeated command
# finds it; a run that has ended is not started again under the same ATTEMPT.
set -euo pipefail
cd "$HOME"
verb=$1 run=sr_dpo/run
shift
mkdir -p "$run"
touch "$run/log" "$run/command" "$run/attempt"

refuse() { printf '%s: %s\n' "$(hostname)" "$1" >&2 && exit 1; }
start() { # ATTEMPT COMMAND...
  mount=$(cat sr_dpo/mount)
  [ -z "$mount" ] || mountpoint -q "$mount" || refuse "$mount: is not mounted; run setup.sh again"
  printf '%s' "$1" >"$run/attempt"
  code=$run/code.$1
  shift
  printf '%s' "$*" >"$run/command"
  # shellcheck disable=SC2016 # the inner shell expands it
  setsid bash -c 'trap : TERM HUP; code=0; "$@" 9>&- || code=$?; echo "$code" >"$0"' "$code" "$@" \
    </dev/null >>"$run/log" 2>&1 &
  echo $! >"$run/pid"
}

case $verb in
  run)
    attempt=$1
    shift
    exec 9>"$run/lock"
    if ! flock --timeout 0.5 9; then
      [ "$*" = "$(cat "$run/command")" ] || refuse "another run is alive: $(cat "$run/command"); end it with stop.sh"
    elif [ "$attempt" != "$(cat "$run/attempt")" ]; then
      start "$attempt" "$@"
    fi
    code=$run/code.$(cat "$run/attempt")
    exec 9>&-
    flock "$run/lock" true
    [ -f "$code" ] || refuse "the run was killed, and left no exit code"
    [ "$(cat "$code")" -eq 0 ] || tail -n 5 "$run/log" >&2
    exit "$(cat "$code")"
    ;;
  stop)
    if ! flock --nonblock "$run/lock" true; then
      pkill -TERM -P "$(cat "$run/pid")" || : # it may have ended just now
      flock "$run/lock" true
    fi
    ;;
  status) ;;
  *) refuse "worker.sh $verb: no such command" ;;
esac
how=running
if flock --nonblock "$run/lock" true; then
  how="ended with $(cat "$run/code.$(cat "$run/attempt")" 2>/dev/null || echo 'no exit code')"
fi
[ -s "$run/command" ] || how='has run nothing'
printf '%s %s  %s\n' "$(hostname)" "$how" "$(tail -n 1 "$run/log")"
