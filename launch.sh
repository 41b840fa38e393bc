#!/usr/bin/env bash
# Runs xlir on a Cloud TPU from creating it to deleting it, or in several processes here.

set -uo pipefail

help() {
  cat <<'HELP'
Usage:
  ./launch.sh tpu --name=NAME --zone=ZONE --type=TYPE --bucket=gs://BUCKET [FLAGS] -- ARGS
  ./launch.sh local [--processes=2] [--devices=4] -- ARGS

ARGS are those of python -m xlir.main, which runs in the root of the repository.

tpu: creates a Cloud TPU VM, installs this working tree on all its workers, mounts the bucket there
as bucket/, runs `python -m xlir.main --distributed ARGS` on all of them, and deletes the TPU in the
end, whatever the end is (also on Ctrl-C). Worker 0's output is shown, and that of any worker that
fails. A preempted TPU is deleted and created again, and the run resumes from its last checkpoint.
The exit code is the program's.
  --name=NAME         name of the TPU (and of the queued resource)
  --zone=ZONE         where, as us-west4-a
  --type=TYPE         accelerator type, as v5litepod-64
  --bucket=gs://NAME  bucket, or a folder in one; runs/ is bucket/runs there, so that the default
                      --workdir, runs/CONFIG, outlives the TPU
  --project=PROJECT   default: that of gcloud
  --version=VERSION   runtime version; default for v5litepod types: v2-alpha-tpuv5-lite
  --extras=tpu        extras of setup.py to install, as tpu,quickstart
  --queued            ask for a queued resource and wait until it is there
  --spot              cheaper, and may be preempted
  --keep              don't delete the TPU in the end: IT COSTS MONEY until you do
  --dry-run           print the commands and run none

local: one process for each i of --processes (at most 64), each with --devices CPU devices (at most
256). Process 0's output is shown as it is, that of the others on stderr after [i]. When one fails,
the others have 60 seconds to end. Ctrl-C and SIGTERM are passed on. The exit code is the first that
is not 0.
The Python is $PYTHON, else .venv/bin/python, else python3.

Examples:
  ./launch.sh tpu --name=xlmr --zone=us-west4-a --type=v5litepod-64 --queued --spot \
      --bucket=gs://my-bucket -- --config=configs/xlmr.py --config.data.dir=bucket/coco
  ./launch.sh local --processes=2 --devices=4 -- --config=configs/quickstart.py

Environment: XLIR_POLL, seconds between two looks at the TPU (15); XLIR_GRACE, seconds that local
processes have after one failed (60). docs/cloud_tpu.md has more.
HELP
}

POLL=${XLIR_POLL:-15}
GRACE=${XLIR_GRACE:-60}

say() { printf 'launch.sh: %s\n' "$*" >&2; }

# The command line, or the machine, can't be used: one line, exit code 2.
fail() {
  say "$*; see ./launch.sh --help"
  exit 2
}

# One line that a shell reads as these words.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# In the background, so that a signal is acted on at once.
pause() {
  sleep "$POLL" >/dev/null 2>&1 &
  wait $!
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
  (($#)) || fail "expected tpu or local"
  local verb=$1
  shift
  case $verb in
    -h | --help | help) help ;;
    tpu) run_tpu "$@" ;;
    local) run_local "$@" ;;
    # Not for users: what `tpu` runs here and on the workers of a TPU.
    pack) pack "$@" ;;
    worker-install) worker_install "$@" ;;
    worker-mount) worker_mount "$@" ;;
    worker-run) worker_run "$@" ;;
    *) fail "unknown verb $verb" ;;
  esac
}

# --- tpu ------------------------------------------------------------------------------------------

name='' zone='' type='' bucket='' version='' extras=tpu
queued='' spot='' keep='' dry_run=''
where=() # Flags that say which project and zone, and that nothing is asked.
args=()  # Those of python -m xlir.main.
tarball=''
child=''   # The command that runs now.
created='' # There may be a TPU that costs money.
state=''   # What Cloud TPU last said of it; GONE where there is none.
answer=''  # The same in gcloud's words.
offline='' # Cloud TPU could not be asked.

run_tpu() {
  parse_tpu "$@"
  tarball=${TMPDIR:-/tmp}/xlir-$name.tar.gz
  if [[ -z $dry_run ]]; then
    command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk"
    refuse_existing
  fi
  trap finish EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  call ./launch.sh pack "$tarball" || exit
  create || exit
  until attempt; do
    say "$name was lost ($state): starting again, from the last checkpoint"
    delete
    # There may be no other TPU right after a preemption. Waiting costs nothing.
    until create; do
      delete
      say "trying again"
      pause
    done
  done
}

parse_tpu() {
  local project=''
  while (($#)); do
    case $1 in
      --name=?*) name=${1#*=} ;;
      --zone=?*) zone=${1#*=} ;;
      --type=?*) type=${1#*=} ;;
      --bucket=?*) bucket=${1#*=} ;;
      --project=?*) project=${1#*=} ;;
      --version=?*) version=${1#*=} ;;
      --extras=?*) extras=${1#*=} ;;
      --queued) queued=1 ;;
      --spot) spot=1 ;;
      --keep) keep=1 ;;
      --dry-run) dry_run=1 ;;
      -h | --help) help && exit ;;
      --) break ;;
      *) refuse "$1" name zone type bucket project version extras ;;
    esac
    shift
  done
  local flag
  for flag in name zone type bucket; do
    [[ -n ${!flag} ]] || fail "--$flag is missing"
  done
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "--name=$name is no name of a TPU: lower-case letters, digits and hyphens"
  [[ $bucket =~ ^gs://[^/]+ ]] || fail "--bucket=$bucket does not begin with gs://"
  [[ $type == v5litepod-* ]] && version=${version:-v2-alpha-tpuv5-lite}
  [[ -n $version ]] || fail "--type=$type needs --version"
  where=("--zone=$zone" --quiet)
  [[ -z $project ]] || where+=("--project=$project")
  (($# > 1)) || fail "there is nothing to run: give the arguments of python -m xlir.main after --"
  shift
  args=("$@")
  refuse_local_workdir
}

# Refuses an argument; says more where it is one of the FLAGS without a value.
refuse() { # ARGUMENT FLAGS...
  local argument=$1 flag
  shift
  for flag in "$@"; do
    [[ $argument != "--$flag" && $argument != "--$flag=" ]] || fail "write --$flag=VALUE"
  done
  [[ $argument == -* ]] && fail "unknown flag ${argument%%=*}"
  fail "unexpected argument $argument: the arguments of python -m xlir.main go after --"
}

# A run in any other folder would be deleted together with the TPU.
refuse_local_workdir() {
  local i workdir=''
  for i in "${!args[@]}"; do
    case ${args[i]} in
      --workdir=* | -workdir=*) workdir=${args[i]#*=} ;;
      --workdir | -workdir) workdir=${args[i + 1]:-} ;;
    esac
  done
  case $workdir in
    '' | runs/* | bucket/*) ;;
    *) fail "--workdir=$workdir would be lost with the TPU: choose runs/NAME or bucket/NAME" ;;
  esac
}

# Only a TPU that this script created may be deleted by it.
refuse_existing() {
  if ! describe; then
    say "gcloud can't be used: $answer"
    exit 1
  fi
  [[ $state == GONE ]] ||
    fail "$name exists already in $zone ($state): delete it, or take another --name"
}

# One life of the TPU. Returns 1 where it was lost; ends the script with the exit code otherwise.
attempt() {
  local code=0
  { await_active && prepare && attend; } || code=$?
  ((code)) && lost 1 && return 1
  # A dry run goes on to show the deletion, as every end does.
  exit "$code"
}

create() {
  created=1
  local flags=("--accelerator-type=$type")
  [[ -z $spot ]] || flags+=(--spot)
  if [[ -n $queued ]]; then
    flags+=("--runtime-version=$version" "--node-id=$name")
    call gcloud compute tpus queued-resources create "$name" "${where[@]}" "${flags[@]}"
  else
    flags+=("--version=$version")
    call gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${flags[@]}"
  fi
}

# Creating a TPU VM waits until it is there; creating a queued resource does not.
await_active() {
  [[ -n $queued ]] || return 0
  if [[ -n $dry_run ]]; then
    echo "# until it says ACTIVE:"
    describe
    return
  fi
  local before=''
  while :; do
    ask
    [[ $state == "$before" ]] || say "$name: $state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      GONE | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    pause
  done
}

prepare() {
  repeat gcloud compute tpus tpu-vm scp "$tarball" "$name:xlir.tar.gz" "${where[@]}" --worker=all &&
    repeat on_workers 'mkdir -p xlir && tar -xzf xlir.tar.gz -C xlir' &&
    repeat on_workers "cd xlir && ./launch.sh worker-install $(quote "$extras")" &&
    repeat on_workers "cd xlir && ./launch.sh worker-mount $(quote "$bucket")"
}

# The program runs on when the connection breaks; only its own end, or that of the TPU, counts.
attend() {
  local code program=(.venv/bin/python -m xlir.main --distributed "${args[@]}")
  while :; do
    offline=''
    on_workers "cd xlir && ./launch.sh worker-run $(quote "${program[@]}")" && return
    code=$?
    # A preemption ends the program before Cloud TPU speaks of it.
    say "exit code $code: looking whether $name is healthy"
    lost 4 && return "$code"
    if ((code != 255)) && [[ -z $offline ]]; then
      say "the program ended with exit code $code"
      return "$code"
    fi
    say "the connection to $name broke; connecting again"
  done
}

# Runs a command on all workers; 255 where one could not be reached.
on_workers() {
  # A connection to a machine that is no more would otherwise be waited for.
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 --command="$1"
}

# Fresh workers may not accept connections yet, and downloads fail at times.
repeat() {
  local code try
  for try in 1 2 3; do
    if [[ $1 == on_workers ]]; then "$@"; else call "$@"; fi && return
    code=$?
    lost 1 && break
    ((try == 3)) || pause
  done
  return "$code"
}

# Whether the TPU is no more, or is at the last of LOOKS looks.
lost() { # LOOKS
  local look
  for ((look = 1; ; look++)); do
    ask
    case $state in
      GONE | PREEMPTED | TERMINATED | SUSPENDING | SUSPENDED | DELETING) return 0 ;;
    esac
    ((look < $1)) || return 1
    pause
  done
}

# Asks until there is an answer: no connection is not no TPU.
ask() {
  until describe; do
    offline=1
    say "no word of $name, asking again: $answer"
    pause
  done
}

describe() {
  local command=(gcloud compute tpus)
  if [[ -n $queued ]]; then
    command+=(queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  else
    command+=(tpu-vm describe "$name" "${where[@]}" '--format=value(state)')
  fi
  if [[ -n $dry_run ]]; then
    quote "${command[@]}"
    return
  fi
  if answer=$("${command[@]}" 2>&1); then
    # Warnings may stand around it.
    state=$(grep -xE '[A-Z_]+' <<<"$answer" | tail -n 1)
    [[ -n $state ]]
  else
    [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]] && state=GONE
  fi
}

# Deleting fails while a TPU is still being created, so it is tried for some minutes.
delete() {
  [[ -n $created ]] || return 0
  local try command=(gcloud compute tpus)
  if [[ -n $queued ]]; then
    # --force: with its TPU.
    command+=(queued-resources delete "$name" "${where[@]}" --force)
  else
    command+=(tpu-vm delete "$name" "${where[@]}")
  fi
  for ((try = 1; try <= 20; try++)); do
    if call "${command[@]}" || { describe && [[ $state == GONE ]]; }; then
      created=''
      return 0
    fi
    pause
  done
  say "COULD NOT DELETE $name. It costs money until you do: $(quote "${command[@]}")"
  return 1
}

# The end, whatever it is.
finish() {
  local code=$?
  trap - EXIT
  # Nothing may stop the deletion.
  trap '' HUP INT TERM
  stop_child
  if [[ -z $keep ]]; then
    delete || code=$((code ? code : 1))
  elif [[ -z $dry_run && -n $created ]]; then
    say "$name is kept, with whatever runs on it. IT COSTS MONEY until you delete it:"
    if [[ -n $queued ]]; then
      say "  gcloud compute tpus queued-resources delete $name $(quote "${where[@]}") --force"
    else
      say "  gcloud compute tpus tpu-vm delete $name $(quote "${where[@]}")"
    fi
  fi
  [[ -n $dry_run ]] || rm -f "$tarball"
  exit "$code"
}

# Ends the command that runs, within 10 seconds.
stop_child() {
  [[ -n $child ]] || return
  local try
  kill -TERM -- "-$child" 2>/dev/null
  for ((try = 0; try < 100; try++)); do
    kill -0 "$child" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL -- "-$child" 2>/dev/null
}

# Prints a command, and runs it unless this is a dry run. It runs in a process group of its own, in
# the background: a signal is acted on at once, and can end the command with all that it started.
call() {
  if [[ -n $dry_run ]]; then
    quote "$@"
    return
  fi
  say "$(quote "$@")"
  local code=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || code=$?
  child=''
  return "$code"
}

# Packs the working tree as it is: what git tracks and what it does not, but nothing ignored.
pack() { # FILE
  local index tree
  index=$(mktemp -d) || return
  tree=$(
    export GIT_INDEX_FILE=$index/index
    git add --all && git write-tree
  ) && git archive --format=tar.gz --output="$1" "$tree"
  local code=$?
  rm -rf "$index"
  return "$code"
}

# --- on a worker of a TPU -------------------------------------------------------------------------

# The Python of the TPU's Ubuntu is too old for today's JAX: uv brings one.
worker_install() { # EXTRAS
  export PIP_BREAK_SYSTEM_PACKAGES=1
  python3 -m pip install --quiet --user uv &&
    python3 -m uv venv --quiet --allow-existing --python=3.12 .venv &&
    python3 -m uv pip install --quiet --python=.venv/bin/python ".[$1]"
}

worker_mount() { # gs://BUCKET[/FOLDER]
  local bucket folder flags
  IFS=/ read -r bucket folder <<<"${1#gs://}"
  command -v gcsfuse >/dev/null || install_gcsfuse || return
  # No cache of metadata: workers must see each other's files at once.
  flags=(--implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0)
  # A complete checkpoint is renamed, which gcsfuse refuses where folders are only names.
  flags+=(--rename-dir-limit=1000000)
  [[ -z $folder ]] || flags+=("--only-dir=${folder%/}")
  mkdir -p bucket
  mountpoint -q bucket || gcsfuse "${flags[@]}" "$bucket" bucket || return
  mkdir -p bucket/runs && ln -sfn bucket/runs runs
}

# As on https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local site=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null || return
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null || return
  # A fresh machine is busy with its own updates for a while.
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 update &&
    sudo apt-get -qq -y -o DPkg::Lock::Timeout=300 install gcsfuse
}

# Starts a command that outlives the connection, or finds it again; shows its output on worker 0,
# and ends with its exit code. 143: this machine was shut down under it.
worker_run() { # COMMAND...
  local number pid code lines=+1
  number=$(worker_number)
  if [[ -e run.pid ]]; then
    lines=10
  else
    # Before tail looks for it, which gives up where it is not there yet.
    : >run.log
    supervise "$@" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
  fi
  pid=$(<run.pid)
  if ((number == 0)); then
    tail -n "$lines" -s 0.2 -f --pid="$pid" run.log
  else
    tail -s 0.2 -f --pid="$pid" /dev/null
  fi
  code=$(cat run.code 2>/dev/null || echo 143)
  if ((code)); then
    ((number == 0)) || tail -n 40 run.log | prefix "worker $number"
    echo "exit code $code" | prefix "worker $number"
  fi >&2
  # ssh's own 255 says that a worker could not be reached.
  return $((code == 255 ? 1 : code))
}

# Notes the exit code. When the machine is shut down, SIGTERM goes to every process on it.
supervise() {
  local program code stopped=''
  trap 'stopped=1' TERM
  "$@" &
  program=$!
  wait "$program"
  code=$?
  while kill -0 "$program" 2>/dev/null; do
    wait "$program"
    code=$?
  done
  [[ -z $stopped ]] || code=143
  echo "$code" >run.code
}

worker_number() {
  [[ -n ${XLIR_WORKER:-} ]] && echo "$XLIR_WORKER" && return
  local site=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  curl -fsS -H 'Metadata-Flavor: Google' "$site/agent-worker-number" || echo 0
}

# --- local ----------------------------------------------------------------------------------------

# Each process takes a third of a gigabyte before it does anything, and all start at once.
MOST_PROCESSES=64
MOST_DEVICES=256
pids=()   # Of the processes that still run, by their number.
signal='' # One to pass on.

run_local() {
  local processes=2 devices=4 python scratch
  while (($#)); do
    case $1 in
      --processes=?*) processes=${1#*=} ;;
      --devices=?*) devices=${1#*=} ;;
      -h | --help) help && exit ;;
      --) break ;;
      *) refuse "$1" processes devices ;;
    esac
    shift
  done
  within processes "$processes" "$MOST_PROCESSES"
  within devices "$devices" "$MOST_DEVICES"
  (($# > 1)) || fail "there is nothing to run: give the arguments of python -m xlir.main after --"
  shift
  python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
  command -v "$python" >/dev/null || fail "there is no $python"
  scratch=$(mktemp -d) || exit 1
  # shellcheck disable=SC2064  # now, not then
  trap "rm -rf $(quote "$scratch")" EXIT
  trap 'signal=INT' INT
  trap 'signal=TERM' TERM HUP
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  start_all "$python" "$processes" "$scratch" "$@"
  await_all
  exit $?
}

# Refuses a number that is not between 1 and MOST. Bash's own numbers end at 19 digits.
within() { # FLAG NUMBER MOST
  if ! [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || (($2 > $3)); then
    fail "--$1=$2 is no number from 1 to $3"
  fi
}

start_all() { # PYTHON PROCESSES SCRATCH ARGS...
  local python=$1 processes=$2 scratch=$3 i
  shift 3
  local command=("$python" -m xlir.main "--coordinator=localhost:$(free_port)")
  command+=("--processes=$processes")
  # Process groups of their own: Ctrl-C comes to this script alone, which passes it on once.
  set -m
  "${command[@]}" --process=0 "$@" </dev/null &
  pids[0]=$!
  for ((i = 1; i < processes; i++)); do
    mkfifo "$scratch/$i"
    prefix "$i" <"$scratch/$i" >&2 &
    "${command[@]}" "--process=$i" "$@" </dev/null >"$scratch/$i" 2>&1 &
    pids[i]=$!
  done
  set +m
}

# Returns the first exit code that is not 0.
await_all() {
  local i code first=0 deadline=''
  while ((${#pids[@]})); do
    if [[ -n $signal ]]; then
      kill -"$signal" "${pids[@]}" 2>/dev/null
      signal=''
      [[ -n $deadline ]] || deadline=$((SECONDS + GRACE))
    fi
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}" 2>/dev/null
      code=$?
      # What it started and left behind.
      kill -KILL -- "-${pids[i]}" 2>/dev/null
      unset "pids[$i]"
      ((code)) || continue
      if ((first)); then
        say "process $i ended with exit code $code"
        continue
      fi
      first=$code
      deadline=$((SECONDS + GRACE))
      say "process $i ended with exit code $code; the others have $GRACE seconds to end"
    done
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
      for i in "${!pids[@]}"; do
        kill -KILL -- "-${pids[i]}" 2>/dev/null
      done
    fi
    sleep 0.1
  done
  # Those that print the last lines of the others.
  wait
  return "$first"
}

# Below the ports that systems hand out by themselves.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null || break
  done
  echo "$port"
}

# Puts [LABEL] before every line; ends with its input, not with a signal.
prefix() { # LABEL
  trap '' HUP INT TERM
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

main "$@"
