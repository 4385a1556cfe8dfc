#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go and within ten minutes:
#
#   bash benchmarks/gpu_round.sh                        # every stage
#   bash benchmarks/gpu_round.sh STAGE...               # some, each then with more of the time
#   bash benchmarks/gpu_round.sh --rehearse [STAGE...]  # on a CPU, over tiny cases: only the code
#
# What is wanted most comes first, and each stage writes its results as it goes. log.txt,
# summary.txt, launch_table.json and the benches' results/*.json go to $OUT (build/gpu_round by
# default); the summary and the report's goals are printed last. The results belong into
# benchmarks/results/, named by their GPU (h200_svd_linear.json). A stage that fails ends nothing
# but makes the exit status 1; those marked optional may fail.
#
# A library that was built elsewhere is used if it is there and serves the GPU.
set -uo pipefail

cd "$(dirname "$0")/.." || exit
rehearse=0
[[ ${1:-} == --rehearse ]] && rehearse=1 && shift
python=${PYTHON:-python3}
out=$(realpath -m "${OUT:-build/gpu_round}")
seconds_in_all=${ROUND_SECONDS:-575}
mkdir -p "$out" || exit
rm -f "$out/launch_table.json"
# What is tuned here is used by what follows, and nothing that was tuned before.
export ADALORA_KERNELS_CACHE=$out PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
log=$out/log.txt summary=$out/summary.txt
: >"$log"
: >"$summary"
failed=0

# The stages in their order, and the seconds that are kept for each of those that are to come.
stages="environment build numerics allocation host train_step svd_linear tune tuned report tests
  sanitizers"
declare -A least=([environment]=30 [numerics]=45 [allocation]=45 [host]=36 [train_step]=60
  [svd_linear]=115 [tune]=55 [tuned]=70 [report]=12 [tests]=55)
reserved=0

if ((rehearse)); then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""
  device=cpu on=(--smoke)
else
  device=cuda on=(--device cuda)
fi

left() {
  local seconds=$((seconds_in_all - SECONDS - reserved))
  echo $((seconds > 1 ? seconds : 1))
}

# stage NAME MOST COMMAND...: run the command for at most so many seconds, and what is left in all.
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 outcome=ok
  shift 2
  ((limit > $(left))) && limit=$(left)
  printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*" >>"$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
  ((status == 0)) || outcome="FAILED: exit status $status"
  ((status == 124 || status == 137)) && outcome="FAILED: not done after $limit s"
  printf '%-30s %4d s  %s\n' "$name" $((SECONDS - start)) "$outcome" | tee -a "$summary"
  ((status == 0))
}

required() { stage "$@" || failed=1; }

optional() {
  local name="$1 (optional)"
  shift
  stage "$name" "$@" || true
}

environment() {
  local gpu="nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
  required environment 30 bash -c "$gpu; nvcc --version | tail -n 2; $python -m adalora_kernels"
}

# Whether the library that is there, if any, computes the importance on this device.
serves() {
  "$python" -c "import sys; from adalora_kernels import ops
sys.exit(any(o.why_not_faster for o in ops.implementations('$device') if 'importance' in o.op))" \
    >>"$log" 2>&1
}

build() {
  local command=("$python" setup.py build_ext) capability
  if ((rehearse)); then
    command+=(--build-lib build/rehearsed --build-temp build/rehearsed)
    required build 90 env ADALORA_KERNELS_BUILD=cpu "${command[@]}"
    return
  fi
  serves && return
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>>"$log" | head -n 1)
  [[ -n $capability ]] && export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
  required build 90 env ADALORA_KERNELS_BUILD=cuda MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    "${command[@]}" --inplace
}

# parallel MOST OPTION...: pytest's options for at most so many processes; none without xdist.
parallel() {
  local count=$(($(nproc) - 2)) most=$1
  shift
  ((count > most)) && count=$most
  ((count > 1)) && "$python" -c "import xdist" 2>/dev/null && echo "-n $count $*"
}

# Our providers of the goals table against float64, as they are shipped. Most of the time goes into
# compiling kernels, which the benches then find compiled.
numerics() {
  # shellcheck disable=SC2046
  required numerics 100 "$python" -m pytest benchmarks/bench_svd_linear.py "${on[@]}" -rfE \
    --benchmark-disable -k "not curve" $(parallel 6 --dist loadgroup)
}

# bench NAME MOST FILE OPTION...: a bench. What is not counted in its seconds is the start of the
# process, up to 14 s, and what a case takes longer than expected, hence the difference.
bench() {
  local name=$1 most=$2 file=$3 seconds=$(left)
  shift 3
  ((seconds > most)) && seconds=$most
  ((rehearse)) && seconds=4
  # pytest-benchmark would time each provider once more, alone.
  required "$name" "$most" "$python" -m pytest "benchmarks/bench_$file.py" "${on[@]}" \
    --benchmark-timer=time.perf_counter --benchmark-max-time=0 --out "$out/results/$name.json" \
    --seconds $((seconds > 44 ? seconds - 22 : seconds / 2)) "$@"
}

allocation() { bench allocation 60 whole_model; }
# What a layer costs the host, through either launcher, beside what the step takes.
host() { bench host 40 host; }
train_step() { bench train_step 300 train_step; }
svd_linear() { bench svd_linear 300 svd_linear; }

# Measures the plans of the goal shapes; what it writes is for kernels/svd_linear/launch_table.json.
tune() {
  local command=(-m adalora_kernels --tune --rows 8192 64)
  if ((rehearse)); then
    command=(-c "import sys, torch; from adalora_kernels import __main__ as command
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
tune, seconds = command.tune, lambda all: {plan: 1e-6 * len(calls[0]()) for plan, calls in all.items()}
command.tune = lambda layers, _: tune(layers, torch.device('cpu'), seconds)
sys.exit(command.main(sys.argv[1:]))" --tune --rows 16 --shapes 32x48 --ranks 8 --dtype float16)
  fi
  optional tune 90 "$python" "${command[@]}"
}

# The goals again, with the plans that were found.
tuned() { bench svd_linear_tuned 150 svd_linear -k "not curve and not 0.1"; }

report() {
  required report 20 "$python" -m benchmarks.report --results "$out/results" \
    --out "$(dirname "$out")/gpu_report/RESULTS.md"
}

tests() {
  local some=()
  ((rehearse)) && some=(tests/test_svd_linear_kernels.py -k "test_every_path and many_tiles")
  # shellcheck disable=SC2046
  required tests 130 "$python" -m pytest -m gpu -rfE --durations=10 \
    --continue-on-collection-errors $(parallel 14) "${some[@]}"
}

# sanitizer HOW TOOL FILE EXPRESSION KERNEL...: tests under compute-sanitizer; only our kernels, by
# parts of their names, are instrumented. Without torch's cache each tensor is its own allocation.
sanitizer() {
  local how=$1 tool=$2 file=$3 expression=$4 name=${3##*/test_} kernel under=()
  shift 4
  if (($(left) < 15)); then
    printf '%-30s no time for it\n' "$tool ${name%.py}" | tee -a "$summary"
    return
  fi
  for kernel in "$@"; do under+=(--kernel-name "kns=$kernel"); done
  under=(compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 10 "${under[@]}")
  ((rehearse)) && under=()
  "$how" "$tool ${name%.py}" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${under[@]}" \
    "$python" -m pytest "$file" -k "$expression"
}

# The CUDA C++ kernels by their namespace, then those of Triton by their names. Of Triton's
# reductions racecheck reports what is none.
sanitizers() {
  local tool
  for tool in memcheck racecheck; do
    sanitizer required $tool tests/test_importance.py "${CSRC_SANITIZED:-library-$device}" adalora
  done
  for tool in memcheck racecheck; do
    sanitizer optional $tool tests/test_svd_linear_kernels.py \
      "${SANITIZED:-test_every_path and many_tiles}" \
      _{split,down,gemm,low_rank_add,g_pass,g_reduce,x_pass}_kernel
  done
}

chosen=${*:-$stages}
for name in $chosen; do
  [[ " ${stages//$'\n'/ } " == *" $name "* ]] || { echo "no stage $name" >&2 && exit 2; }
  ((reserved += ${least[$name]:-0}))
done
for name in $chosen; do
  ((reserved -= ${least[$name]:-0}))
  "$name"
done

echo
what='^== |^(FAILED|ERROR)|^[0-9]+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY'
sed '/^== report/,/^== tests/d' "$log" | grep -E "$what" | sed 's/, at most .*//' | head -n 50
sed -n '/^== report/,/^== tests/p' "$log" | tail -n 70
printf '%-30s %4d s  %s\n' "whole round" "$SECONDS" \
  "$( ((failed)) && echo FAILED || echo ok)" | tee -a "$summary"
exit "$failed"
