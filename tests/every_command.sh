#!/usr/bin/env bash
# Every command of sr-dpo, end to end, on real pairs and a model small enough for a laptop.
#
#   tests/every_command.sh WORK_DIR
#
# What a user does with a model of their own, in that order: look at it, fine-tune it, train it by DPO and Sr-DPO
# (stopped, killed and taken up again on the way), choose λ, compare answers, run a benchmark, export, report. Needs
# sr-dpo on PATH or in $SR_DPO and the package openai; `lm-eval` needs the extra `eval` and `compile` the extra `tpu`,
# and without them these steps are left out, and said so. The pairs are those of ../shared/data where they are, else
# some that the script generates.
# `sr-dpo demo` has a world of its own and is left out here.
# The judge is a server of this script, unless OPENAI_BASE_URL and OPENAI_API_KEY name another. Expect five minutes on
# two cores.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=${1:?usage: tests/every_command.sh WORK_DIR}
read -r -a sr_dpo <<< "${SR_DPO:-sr-dpo}"
python=${PYTHON:-python3}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
mkdir -p "$work"
cd "$work"

say() { printf '\n== %s\n' "$*"; }

ends_with() { # ends_with CODE PID: waits for a process in the background
    local code=0
    wait "$2" || code=$?
    if [ "$code" -ne "$1" ]; then
        echo "exit code $code, expected $1" >&2
        exit 1
    fi
}

wait_for() { # wait_for SECONDS COMMAND...: until it succeeds
    local deadline=$((SECONDS + $1))
    until "${@:2}"; do
        if [ $SECONDS -ge $deadline ]; then
            echo "not within $1 s: ${*:2}" >&2
            exit 1
        fi
        sleep 0.02
    done
}

at_least() { # at_least LINES FILE
    [ -f "$2" ] && [ "$(wc -l < "$2")" -ge "$1" ]
}

say "a world: model, pairs, questions, a task"
"$python" "$here/every_command_world.py" .

say "inspect: shapes, memory, where p can stand"
"${sr_dpo[@]}" inspect base --mesh fsdp=8 --json inspection.json

say "train: SFT, then export"
"${sr_dpo[@]}" train sft.yaml
"${sr_dpo[@]}" export runs/sft sft-model

say "train: DPO, with two evaluation sets, sample responses, the best checkpoint kept"
"${sr_dpo[@]}" train dpo.yaml
"${sr_dpo[@]}" export runs/dpo dpo-best --best

say "train: Sr-DPO, preempted after some steps (SIGTERM, exit code 75), then killed (SIGKILL), then to its end"
for signal in TERM KILL; do
    done_before=$(if [ -f runs/sr_dpo/metrics.jsonl ]; then wc -l < runs/sr_dpo/metrics.jsonl; else echo 0; fi)
    "${sr_dpo[@]}" train sr_dpo.yaml &
    pid=$!
    wait_for 300 at_least $((done_before + 3)) runs/sr_dpo/metrics.jsonl
    kill -s "$signal" "$pid"
    if [ "$signal" = TERM ]; then ends_with 75 "$pid"; else ends_with 137 "$pid"; fi
done
"${sr_dpo[@]}" train sr_dpo.yaml

say "eval and score: held-out metrics, log-probabilities of every pair"
"${sr_dpo[@]}" eval sr_dpo.yaml
"${sr_dpo[@]}" score sr_dpo.yaml --output scores.jsonl --knowledge

say "compare: DPO, Sr-DPO and a contrast whose weight the model's own knowledge gives"
"${sr_dpo[@]}" compare sr_dpo.yaml dpo sr_dpo,lam=0.5 \
    sr_dpo,lam=auto,refinement.form=contrast,refinement.judge=reference \
    output_dir=runs/compare train.max_steps=2 --betas 1

say "tune: the weight of the refinement, on one reference cache"
"${sr_dpo[@]}" tune sr_dpo.yaml objective.lam=0.1,1 output_dir=runs/tune train.max_steps=2 --eval-pairs 16

say "generate: answers of both models, the second killed and taken up again"
"${sr_dpo[@]}" generate dpo.yaml --prompts questions.jsonl --output dpo-answers.jsonl
"${sr_dpo[@]}" generate sr_dpo.yaml --prompts questions.jsonl --output sr_dpo-answers.jsonl &
pid=$!
wait_for 300 at_least 3 sr_dpo-answers.jsonl.partial
kill -s KILL "$pid"
ends_with 137 "$pid"
"${sr_dpo[@]}" generate sr_dpo.yaml --prompts questions.jsonl --output sr_dpo-answers.jsonl

say "judge: win, tie and lose of the two files"
if [ -z "${OPENAI_BASE_URL:-}" ]; then
    "$python" "$here/fake_endpoint.py" > endpoint &
    endpoint=$!
    trap 'kill "$endpoint"' EXIT
    wait_for 30 test -s endpoint
    OPENAI_BASE_URL=$(cat endpoint)
    OPENAI_API_KEY=none
    export OPENAI_BASE_URL OPENAI_API_KEY
fi
"${sr_dpo[@]}" judge sr_dpo-answers.jsonl dpo-answers.jsonl --questions questions.jsonl --output judged.json \
    --model "${JUDGE_MODEL:-length}"

say "lm-eval: a task of multiple choice made from the held-out pairs"
if "$python" -c 'import lm_eval' 2> /dev/null; then
    "${sr_dpo[@]}" lm-eval runs/sr_dpo --tasks held_out --include-path tasks --limit 16 --output harness.json
else
    echo "LEFT OUT: the extra eval is not installed"
fi

say "export: a Hugging Face directory"
"${sr_dpo[@]}" export runs/sr_dpo sr_dpo-model --dtype bfloat16

say "report: all runs on one page"
"${sr_dpo[@]}" report runs/sft runs/dpo runs/sr_dpo --output report.html --with-texts

say "compile: whether the run would fit a TPU"
if "$python" -c 'import libtpu' 2> /dev/null; then
    "${sr_dpo[@]}" compile sr_dpo.yaml --topology v5e:2x2 --quick --json compiled.json
else
    echo "LEFT OUT: the extra tpu is not installed"
fi

say "done; everything is in $work"
