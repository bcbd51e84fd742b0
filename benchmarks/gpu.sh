#!/usr/bin/env bash
# gpu.sh: build for this machine's GPU, test, check and benchmark, in 12 minutes and without a network.
#
#   benchmarks/gpu.sh [RESULTS_FOLDER]        default: benchmarks/results
#
# The report is written at the end: where something else ends the script sooner, RFK_GPU_SECONDS (default 710) says when.
#
# Needs torch with CUDA, nvcc, cmake and a C++ compiler; triton, pytest and hypothesis where there. Nothing is installed
# into the environment: the package goes to a temporary folder. Writes gpu-<name>.json (what every stage found) and
# gpu-<name>.csv (one row a measurement). A stage that fails is recorded and the rest goes on; exit code 1 then.
# PYTHON chooses the interpreter (default python3), RFK_SANITIZER=1 adds a compute-sanitizer run when time is left.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
results=$(mkdir -p "${1:-$root/benchmarks/results}" && cd "${1:-$root/benchmarks/results}" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir -p "$site" "$work/logs"
start=$SECONDS
limit=${RFK_GPU_SECONDS:-710}
: >"$work/stages.tsv"

left() { echo $((limit - (SECONDS - start))); }

# until_end SECONDS MARGIN: when a stage of so many seconds must begin nothing more, to end by itself.
until_end() { echo $((($1 < $(left) ? $1 : $(left)) - $2)); }

# stage NAME SECONDS COMMAND...: runs it within that time, and within what is left of the whole.
stage() {
  local name=$1 seconds=$2 begin=$SECONDS rc
  shift 2
  if [ "$(left)" -lt 5 ]; then
    printf '%s\tskipped\t0\n' "$name" >>"$work/stages.tsv"
    echo "== $name: skipped, no time left"
    return 1
  fi
  [ "$seconds" -gt "$(left)" ] && seconds=$(left)
  echo "== $name (at most $seconds s)"
  # an interrupt, on which pytest still says what failed so far
  timeout -s INT -k 5 "$seconds" "$@" >"$work/logs/$name.log" 2>&1
  rc=$?
  printf '%s\t%s\t%s\n' "$name" "$rc" "$((SECONDS - begin))" >>"$work/stages.tsv"
  if [ "$rc" -ne 0 ]; then
    echo "   failed with $rc after $((SECONDS - begin)) s; the end of its output:"
    tail -n 12 "$work/logs/$name.log" | sed 's/^/   | /'
  else
    echo "   done in $((SECONDS - begin)) s; $(tail -n 1 "$work/logs/$name.log" | cut -c1-150)"
  fi
  return "$rc"
}

require() { # what the rest cannot do without
  local missing=()
  command -v nvcc >/dev/null || { [ -x /usr/local/cuda/bin/nvcc ] && export PATH=$PATH:/usr/local/cuda/bin; }
  command -v nvcc >/dev/null || missing+=("nvcc (CUDA toolkit; put it on PATH)")
  command -v cmake >/dev/null || missing+=("cmake")
  command -v c++ >/dev/null || missing+=("a C++17 compiler")
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    missing+=("torch that sees a CUDA device, in $python")
  if [ ${#missing[@]} -gt 0 ]; then
    printf 'gpu.sh: missing: %s\n' "${missing[@]}" >&2
    exit 2
  fi
}
require

has() { "$python" -c "import $1" 2>/dev/null; }

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
arch=$capability-real
[ "$capability" = 90 ] && arch=90a-real
name=$("$python" -c 'import re, torch; print(re.sub("[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower())')
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)

build_by_pip() {
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index \
    --target "$site" "$root" -C cmake.define.RFK_CUDA=ON -C "cmake.define.RFK_CUDA_ARCHS=$arch" -C "build-dir=$work/build"
}

# Without scikit-build-core or pybind11: the core by cmake, the module by hand against the pybind11 that torch brings.
build_by_hand() {
  local headers suffix cudart
  headers=$("$python" -c 'import pybind11; print(pybind11.get_include())' 2>/dev/null ||
    "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
  if [ ! -f "$headers/pybind11/pybind11.h" ]; then
    echo "pybind11 is missing: neither the package nor torch's copy of its headers is there"
    return 1
  fi
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  cmake "${generator[@]}" -S "$root" -B "$work/build" -DRFK_PYTHON=OFF -DRFK_CUDA=ON "-DRFK_CUDA_ARCHS=$arch" &&
    cmake --build "$work/build" --parallel "$(nproc)" --target rfk_core &&
    cudart=$(sed -n 's/^CUDA_cudart_static_LIBRARY:FILEPATH=//p' "$work/build/CMakeCache.txt") &&
    cp -r "$root/rfkernels" "$site/" && rm -f "$site"/rfkernels/*.so &&
    c++ -O3 -std=c++17 -fPIC -shared -fvisibility=hidden -fopenmp "-I$headers" "-I$root/csrc/include" "-I$root/csrc" \
      "-I$root/python/bindings" \
      "-I$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" "$root"/python/bindings/*.cpp \
      "$work/build/librfk_core.a" "$cudart" -lrt -ldl \
      -lpthread -o "$site/rfkernels/_C$suffix"
}
export -f build_by_pip build_by_hand
export python root work site arch
export generator_flag="${generator[*]:-}"

echo "gpu.sh: $name, compute capability $capability, building for $arch; results in $results"
built=1
if has scikit_build_core && has pybind11; then
  stage build 200 bash -c build_by_pip && built=0
else
  echo "   scikit-build-core or pybind11 is not installed here: building without them"
fi
if [ "$built" -ne 0 ]; then
  stage build_by_hand 200 bash -c "generator=($generator_flag); $(declare -f build_by_hand); build_by_hand" && built=0
fi

if [ "$built" -eq 0 ]; then
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  cd "$work" || exit 1 # so that the checkout does not shadow the built package
  export PYTHONSAFEPATH=1 # the same; python -P, which 3.10 has not
  stage import 60 "$python" -c 'import torch, rfkernels as rf; x = torch.ones(5, device="cuda")
with rf.use_backend("native"): print(rf.euler_step(x, x, 0.5).tolist())'
  stage checks 210 "$python" "$root/benchmarks/gpu_checks.py" --out "$work/checks.json"
  # Those of the CUDA kernels and of captured loops take seconds. A file whose imports are missing here must not stop the others.
  tests=("$python" -m pytest -q --maxfail=25 -p no:cacheprovider --continue-on-collection-errors)
  if has pytest && has hypothesis; then
    stage tests 90 "${tests[@]}" "$root/tests/ops" "$root/tests/sampling/test_cuda_graph.py" -k "native-cuda or on_cuda or captured"
  else
    echo "   pytest or hypothesis is not installed here: no tests"
    printf 'tests\tskipped: pytest or hypothesis is missing\t0\n' >>"$work/stages.tsv"
  fi
  if [ -f "$root/benchmarks/run.py" ]; then
    # against cuDNN's and flash attention in the same process; float32 baselines are of no interest here
    stage attention 170 "$python" "$root/benchmarks/run.py" --device cuda --only attention \
      --seconds 0.5 --limit "$(until_end 170 60)" --out "$work/attention.csv"
    # Every op first, then beside torch.compile, which takes a while for each spelling, as far as the time goes.
    ops=("$python" "$root/benchmarks/run.py" --device cuda --only "ode_step,interpolate,flow_loss,random,projected_update" --seconds 0.3)
    stage benchmarks 90 "${ops[@]}" --no-compile --limit "$(until_end 90 20)" --out "$work/benchmarks.csv"
    stage compiled 90 "${ops[@]}" --sizes 16Mi --dtypes float32 --limit "$(until_end 90 40)" --out "$work/compiled.csv"
  else
    printf 'benchmarks\tskipped: benchmarks/run.py is missing\t0\n' >>"$work/stages.tsv"
  fi
  if has diffusers; then
    stage schedulers 60 "$python" "$root/benchmarks/schedulers.py" --device cuda --seconds 0.3 --out "$work/schedulers.csv"
  else
    printf 'schedulers\tskipped: diffusers is missing\t0\n' >>"$work/stages.tsv"
  fi
  # Last, as Triton compiles kernels for every case: all that is left. The bits of its step ops are among the checks above.
  if has pytest && has hypothesis && has triton; then
    stage tests_triton 150 "${tests[@]}" "$root"/tests/ops/test_{triton_interpreter,attention_triton}.py "$root/tests/ops" -k "triton and not aot"
  fi
  if [ "${RFK_SANITIZER:-0}" = 1 ] && command -v compute-sanitizer >/dev/null; then
    stage memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 3 "$python" "$root/benchmarks/gpu_checks.py" --smoke
    stage racecheck 90 compute-sanitizer --tool racecheck --error-exitcode 3 "$python" "$root/benchmarks/gpu_checks.py" --smoke
  fi
fi

# One JSON with the stages, the ends of failed logs and the checks; one CSV with every row measured.
"$python" - "$work" "$results/gpu-$name" "$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)" <<'PY'
import csv, json, pathlib, sys, time
work, target, commit = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
stages, failed = {}, False
for line in (work / "stages.tsv").read_text().splitlines():
    name, status, seconds = line.split("\t")
    stages[name] = {"status": "ok" if status == "0" else status, "seconds": int(seconds)}
    log = work / "logs" / f"{name}.log"
    if log.exists():
        text = log.read_text(errors="replace").splitlines()
        stages[name]["last_line"] = text[-1] if text else ""
        if status != "0":
            failed, stages[name]["log_end"] = True, text[-60:]
    else:
        failed = True
checks = work / "checks.json"
report = {"commit": commit, "date": time.strftime("%Y-%m-%d"), "stages": stages}
try:
    report["gpu_checks"] = json.loads(checks.read_text())
except (OSError, ValueError):  # none, or stopped while writing
    report["gpu_checks"] = None
pathlib.Path(target + ".json").write_text(json.dumps(report, indent=1) + "\n")
rows = []
for source in (work / "checks.csv", *sorted(work.glob("benchmarks*/**/*.csv")), *(work / f"{name}.csv" for name in ("benchmarks", "compiled", "attention", "schedulers"))):
    if source.is_file():
        with source.open(newline="") as stream:
            rows += [{"source": source.stem, **row} for row in csv.DictReader(stream)]
if rows:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(target + ".csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
print("\nsummary")
for name, stage in stages.items():
    print(f"  {name:16s} {stage['status']:>8s}  {stage['seconds']:4d} s  {stage.get('last_line', '')[:90]}")
for name, check in ((report["gpu_checks"] or {}).get("checks") or {}).items():
    detail = {k: v for k, v in check.items() if k not in ("ok", "seconds", "profiled", "compared") and v}
    print(f"  check {name:18s} {'ok' if check['ok'] else 'FAIL ' + json.dumps(detail)[:300]}")
print(f"  {target}.json, {len(rows)} rows in {target}.csv")
sys.exit(failed)
PY
status=$?
echo "gpu.sh: $((SECONDS - start)) s in all"
exit "$status"
