# Shared by install.sh and build_horovod.sh: messages, a lock, and commands that run with their output in a log.
# shellcheck shell=bash
# The caller sets LOG before run_logged is used.

# Shared with the scripts that this one starts, so that all lines count from the same moment.
export HOROVOD_JOBS_STARTED_S=${HOROVOD_JOBS_STARTED_S:-$(date +%s)}
CHILD=

say() { printf '[%4ds] %s\n' "$(($(date +%s) - HOROVOD_JOBS_STARTED_S))" "$*"; }
note() { printf '        %s\n' "$*"; }

# fail CODE MESSAGE...: one line on stderr. Codes follow horovod_jobs/errors.py: 5 setup, 6 storage.
fail() {
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

# Ends the command that run_logged or run_script started, with everything below it.
stop_child() {
  [ -n "$CHILD" ] || return 0
  kill -TERM -- "-$CHILD" 2>/dev/null || kill -TERM "$CHILD" 2>/dev/null || true
  wait "$CHILD" 2>/dev/null || true
  CHILD=
}

# run_logged TITLE COMMAND...: output goes to $LOG; a line every 20 s says that it still runs, and its tail is shown if it fails.
run_logged() {
  local title=$1 began=$SECONDS shown=$SECONDS rc=0 percent
  shift
  say "$title"
  printf '\n### %s: %s\n' "$title" "$*" >>"$LOG"
  # A process group of its own, so that stop_child reaches the compilers too.
  set -m
  "$@" >>"$LOG" 2>&1 </dev/null &
  CHILD=$!
  set +m
  while kill -0 "$CHILD" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - shown >= 20)); then
      shown=$SECONDS
      percent=$(tail -n 200 "$LOG" | grep -oE '^ *\[ *[0-9]+%\]' | tail -n 1 | tr -d ' []' || true)
      note "still running, $((SECONDS - began)) s${percent:+, $percent compiled}"
    fi
  done
  wait "$CHILD" || rc=$?
  CHILD=
  if ((rc != 0)); then
    printf 'error: "%s" failed with code %s; the end of its output:\n' "$title" "$rc" >&2
    tail -n 30 "$LOG" | sed 's/^/    /' >&2
    printf 'the whole output is in %s\n' "$LOG" >&2
    exit 5
  fi
}

# run_script COMMAND...: a script that reports for itself; a signal to us is passed on to it.
run_script() {
  local rc=0
  set -m
  "$@" </dev/null &
  CHILD=$!
  set +m
  wait "$CHILD" || rc=$?
  CHILD=
  return "$rc"
}

# take_lock FILE PYTHON: holds FILE locked on descriptor 9 until this script and its children have ended, however they end.
# Python takes the lock, because flock(1) is not on every system; the lock belongs to the descriptor, so it outlives Python.
take_lock() {
  local file=$1 python=$2
  exec 9>>"$file" || fail 6 "cannot write the lock file $file; check its owner, or choose another place"
  if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
    say "another installation holds $file; waiting for it"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  fi
}

sha256_stdin() {
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

cache_root() { printf '%s\n' "${HOROVOD_JOBS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/horovod_jobs}"; }

# free_mb PATH: free space where PATH is or would be.
free_mb() {
  local path=$1
  while [ ! -e "$path" ]; do path=$(dirname "$path"); done
  df -Pk "$path" | awk 'NR == 2 { print int($4 / 1024) }'
}

# how_to_get THING: the command for this system's package manager.
how_to_get() {
  local manager=conda sudo=
  [ "$(id -u)" = 0 ] || sudo='sudo '
  if command -v apt-get >/dev/null; then
    manager=apt
  elif command -v dnf >/dev/null; then
    manager=dnf
  fi
  case $manager/$1 in
    apt/compiler) printf '%sapt-get install -y g++\n' "$sudo" ;;
    dnf/compiler) printf '%sdnf install -y gcc-c++\n' "$sudo" ;;
    conda/compiler) echo 'conda install -c conda-forge cxx-compiler' ;;
    apt/* | dnf/*) printf '%s%s install -y %s\n' "$sudo" "${manager/apt/apt-get}" "$(package_name "$manager" "$1")" ;;
    *) printf 'conda install -c conda-forge %s\n' "$(package_name conda "$1")" ;;
  esac
}

package_name() {
  case $1/$2 in
    apt/python) echo 'python3 python3-venv python3-dev' ;;
    dnf/python) echo 'python3 python3-devel' ;;
    conda/*python* | conda/venv) echo 'python>=3.10' ;;
    apt/venv) echo 'python3-venv' ;;
    dnf/venv) echo 'python3' ;;
    apt/python-headers) echo 'python3-dev' ;;
    dnf/python-headers) echo 'python3-devel' ;;
    *) echo "$2" ;;
  esac
}
