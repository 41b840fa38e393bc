#!/usr/bin/env bash
# Runs xlir on a Cloud TPU, which it creates and deletes, or in several processes on this machine.
set -uo pipefail

help() {
  cat <<'HELP'
Usage:
  ./launch.sh tpu --name=NAME --zone=ZONE --type=TYPE --bucket=gs://BUCKET [FLAGS] -- ARGS
  ./launch.sh local [--processes=2] [--devices=4] -- ARGS

tpu: waits for a Cloud TPU, installs this working tree on its workers, mounts the bucket there as
bucket/ (and its folder runs/ as runs/), and runs python -m xlir.main --distributed ARGS on all
workers. It deletes the TPU at the end, also after a failure or Ctrl-C. A preempted TPU is replaced,
and the run resumes from its last checkpoint. docs/cloud_tpu.md says what you have to set up first.
  --type=TYPE       accelerator type, for example v5litepod-64
  --version=V       runtime version, by default v2-alpha-tpuv5-lite (for v5e)
  --mount=COMMAND   command that mounts the bucket on a worker, by default gcsfuse
  --spot            uses a cheaper TPU, which may be preempted
  --dry-run         prints the commands instead of running them

local: runs python -m xlir.main ARGS in 1 to 64 processes with 1 to 256 CPU devices each. The output
of process 0 is shown unchanged. Lines of process 1 go to stderr after [1], and so on. Signals are
passed on to all processes. After a signal or a failure, the remaining processes have 60 seconds
($XLIR_GRACE) to end. Python is $PYTHON, or else .venv/bin/python, or else python3.

The exit code is that of the first process that failed, or 0 if none failed.
HELP
}

name='' zone='' type='' bucket='' version=v2-alpha-tpuv5-lite mount='' spot='' dry_run=''
processes=2 devices=4 args=() # The arguments of python -m xlir.main.

POLL=${XLIR_POLL:-15} # Seconds between two queries of the TPU's state.
LOST='GONE|PREEMPTED|TERMINATED|SUSPENDING|SUSPENDED|DELETING'
state='' # Last known state of the TPU, or the error of the query; GONE if there is no TPU.
child='' # Process group of the last command that "call" started.
GRACE=${XLIR_GRACE:-60} # Seconds that local processes get to end before they are killed.

say() { printf 'launch.sh: %s\n' "$*" >&2; }
fail() { say "$*; see ./launch.sh --help" && exit 2; }

# Prints words as one line of shell code, quoted.
quote() { printf '%q ' "$@" && echo; }

parse() { # VERB ARGUMENTS...
  local verb=$1 flag
  while shift && (($#)) && [[ $1 != -- ]]; do
    flag=${1%%=*} flag=${flag#--}
    case $verb:$1 in
      *:-h | *:--help) help && exit ;;
      tpu:--spot | tpu:--dry-run) printf -v "${flag/-/_}" yes ;;
      tpu:--name=?* | tpu:--zone=?* | tpu:--type=?* | tpu:--bucket=?* | tpu:--version=?* | \
      tpu:--mount=?* | local:--processes=?* | local:--devices=?*) printf -v "$flag" %s "${1#*=}" ;;
      *) fail "can't use $1: $verb has no such flag, or it needs =VALUE, or it belongs after --" ;;
    esac
  done
  (($# > 1)) || fail "nothing to run: give the arguments of python -m xlir.main after --"
  args=("${@:2}")
}

run_tpu() {
  local code tree
  check_tpu
  # The archive holds all files of the working tree that git does not ignore.
  tree=$(export GIT_INDEX_FILE="$scratch/index" && git add --all && git write-tree) || exit
  call git archive --format=tar.gz "--output=$scratch/xlir.tar.gz" "$tree" || exit
  trap finish EXIT
  trap 'exit 129' HUP && trap 'exit 130' INT && trap 'exit 143' TERM
  create || exit
  until run; do
    code=$?
    say "exit code $code: checking whether $name was preempted, which Google may report late"
    reaches "$LOST" 4 || exit "$code"
    say "$name was lost ($state): creating another TPU, to resume from the last checkpoint"
    until delete && create; do pause; done
  done
}

check_tpu() {
  local flag
  for flag in name zone type bucket; do [[ -n ${!flag} ]] || fail "--$flag is missing"; done
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name must look like my-tpu-2"
  [[ $bucket =~ ^gs://[a-z0-9][-_.a-z0-9]+$ ]] || fail "--bucket=$bucket must look like gs://my-bucket"
  [[ " ${args[*]}" =~ \ --?workdir[=\ ]([^ ]*) && ${BASH_REMATCH[1]} != @(runs|bucket)/* ]] &&
    fail "--workdir=${BASH_REMATCH[1]} would be lost with the TPU: use runs/NAME or bucket/NAME"
  [[ -z $dry_run ]] || return 0
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk"
  # The TPU is deleted at the end, so it must not be one that exists already.
  reaches GONE 1 || fail "$name already exists in $zone, or its state is unknown ($state)"
}

create() {
  call gcloud compute tpus queued-resources create "$name" "--zone=$zone" --quiet \
    "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot}
}

# Waits for the TPU, prepares it, and runs the program; returns the exit code of the first command
# that failed, or 0.
run() {
  local tpu=(gcloud compute tpus tpu-vm) flags=("--zone=$zone" --quiet --worker=all) ssh
  [[ -n $dry_run ]] || reaches "ACTIVE|FAILED|$LOST" 1000000000
  [[ -n $dry_run || $state == ACTIVE ]] || return 1
  # With ServerAliveInterval, ssh ends when a worker no longer answers.
  ssh=("${tpu[@]}" ssh "$name" "${flags[@]}" --ssh-flag=-oServerAliveInterval=30)
  # The Python of the TPU's image is too old for current JAX, so uv installs another one.
  local install="PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --allow-existing --python=3.12 .venv && \
python3 -m uv pip install --quiet --python=.venv/bin/python '.[tpu,quickstart]'"
  # Metadata are not cached, so that workers see each other's files at once. Orbax renames the
  # folder of a complete checkpoint; gcsfuse limits how many files a renamed folder may hold.
  mount=${mount:-gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
--metadata-cache-negative-ttl-secs=0 ${bucket#gs://} bucket}
  repeat "${tpu[@]}" scp "$scratch/xlir.tar.gz" "$name:" "${flags[@]}" &&
    repeat "${ssh[@]}" --command="mkdir -p xlir/bucket && cd xlir && tar -xzf ../xlir.tar.gz && \
$install" &&
    repeat "${ssh[@]}" --command="cd xlir && \
(mountpoint -q bucket || bash -ec $(quote "$mount")) && \
mkdir -p bucket/runs && ln -sfn bucket/runs runs" &&
    call "${ssh[@]}" \
      --command="cd xlir && $(quote .venv/bin/python -m xlir.main --distributed "${args[@]}")"
}

# Tries a command three times: new workers may not accept connections yet, and downloads may fail.
repeat() { call "$@" || { pause && call "$@"; } || { pause && call "$@"; }; }

# Queries the state of the TPU, at most TIMES times, until it is one of STATES.
reaches() { # STATES TIMES
  local i
  for ((i = 0; i < $2; i++)); do
    ((i == 0)) || pause
    state=$(gcloud compute tpus queued-resources describe "$name" "--zone=$zone" --quiet \
      '--format=value(state.state)' 2>"$scratch/error") || state=$(<"$scratch/error")
    [[ $state =~ (NOT_FOUND|was not found) ]] && state=GONE
    [[ ! $state =~ ^($1)$ ]] || return 0
  done
  return 1
}

# Never gives up, because a TPU costs money until it is deleted. A TPU can't be deleted while it is
# being created.
delete() {
  until call gcloud compute tpus queued-resources delete "$name" "--zone=$zone" --quiet --force ||
    reaches GONE 1; do
    say "COULD NOT DELETE $name, which costs money until it is deleted. Trying again" && pause
  done
}

finish() {
  local code=$?
  trap '' HUP INT TERM # Signals must not stop the deletion.
  [[ -z $child ]] || kill -KILL -- "-$child" 2>/dev/null
  delete
  rm -rf "$scratch"
  exit "$code"
}

# Runs a command, or prints it in a dry run. It runs in the background, so that this script handles
# signals at once, and in its own process group, so that "finish" can kill all its processes.
call() {
  if [[ -n $dry_run ]]; then quote "$@" && return; fi
  say "$(quote "$@")"
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child"
}

pause() { sleep "$POLL" >/dev/null 2>&1 & wait $!; }

run_local() {
  local python command port i code pids=() signal='' first='' deadline=''
  [[ $processes =~ ^[1-9][0-9]?$ && $processes -le 64 ]] || fail "--processes takes 1 to 64"
  [[ $devices =~ ^[1-9][0-9]{0,2}$ && $devices -le 256 ]] || fail "--devices takes 1 to 256"
  python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
  # A free port below the range from which systems assign ports.
  until port=$((20000 + RANDOM % 12000)) && ! : 2>/dev/null <"/dev/tcp/localhost/$port"; do :; done
  command=("$python" -m xlir.main "--coordinator=localhost:$port" "--processes=$processes")
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
  trap 'signal=INT' INT && trap 'signal=TERM' TERM HUP
  # Each process has its own process group: Ctrl-C reaches only this script, which passes it on.
  set -m
  "${command[@]}" --process=0 "${args[@]}" </dev/null &
  pids[0]=$!
  for ((i = 1; i < processes; i++)); do
    mkfifo "$scratch/$i"
    sed -u "s/^/[$i] /" <"$scratch/$i" >&2 &
    "${command[@]}" "--process=$i" "${args[@]}" </dev/null >"$scratch/$i" 2>&1 &
    pids[i]=$!
  done
  set +m
  while ((${#pids[@]})); do
    [[ -z $deadline ]] || ((SECONDS < deadline)) || signal=KILL
    if [[ -n $signal ]]; then
      kill "-$signal" "${pids[@]}" 2>/dev/null
      signal='' deadline=${deadline:-$((SECONDS + GRACE))}
    fi
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}" 2>/dev/null
      code=$?
      kill -KILL -- "-${pids[i]}" 2>/dev/null # Its leftover processes.
      unset "pids[$i]"
      ((code)) || continue
      say "process $i ended with exit code $code"
      first=${first:-$code} deadline=${deadline:-$((SECONDS + GRACE))}
    done
    sleep 0.1
  done
  wait # Until the last lines of output are printed.
  return "${first:-0}"
}

cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
[[ ${1:-} != -h && ${1:-} != --help ]] || { help && exit; }
[[ ${1:-} == tpu || ${1:-} == local ]] || fail "expected tpu or local, not '${1:-}'"
parse "$@"
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
"run_$1"
