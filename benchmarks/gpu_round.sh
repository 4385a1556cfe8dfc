#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go and within nine minutes:
#
#   bash benchmarks/gpu_round.sh           # every stage
#   bash benchmarks/gpu_round.sh STAGE...  # some, each then with more of the time
#
# Writes log.txt, summary.txt, profile.csv, launch_table.json and the benches' results/*.json to $OUT
# (build/gpu_round by default), and prints the summary and the report's goals last. The results
# belong into benchmarks/results/, named by their GPU (h200_svd_linear.json). A stage that fails ends
# nothing but makes the exit status 1; only the stages marked optional may fail.
#
# A library that was built elsewhere can be brought along: as build/carried/_C.abi3.so it is only
# tried, or used where none can be built here; as adalora_kernels/_C.abi3.so it is used.
set -uo pipefail

cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu_round}
seconds_in_all=${ROUND_SECONDS:-520}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" || exit
log=$out/log.txt summary=$out/summary.txt carried=$PWD/build/carried/_C.abi3.so
: >"$log"
: >"$summary"
failed=0

# So much of the time is reserved for the benchmarks at the end, if they are still to come.
reserved=0
declare -A least=([allocation]=70 [host]=35 [train_step]=80 [svd_linear]=70 [report]=15)

left() {
  local seconds=$((seconds_in_all - SECONDS - reserved))
  echo $((seconds > 1 ? seconds : 1))
}

# stage NAME LIMIT COMMAND...: run the command for at most LIMIT seconds, and what is left in all.
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
  if (($(left) >= 10)); then
    stage "$name" "$@" || true
  else
    printf '%-30s no time for it\n' "$name" | tee -a "$summary"
  fi
}

has_cuda_library() {
  "$python" -c "import sys; from adalora_kernels import ops
sys.exit('cuda' not in ops.library.device_types)" >>"$log" 2>&1
}

environment() {
  local gpu="nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
  required environment 30 bash -c "$gpu; nvcc --version | tail -n 2; $python -m adalora_kernels"
}

# Whether a binary from elsewhere can be loaded by this torch, and computes the right thing.
carried() {
  [[ -e $carried ]] || return 0
  optional carried 30 env ADALORA_KERNELS_LIBRARY="$carried" "$python" -m adalora_kernels
}

build() {
  has_cuda_library && return
  required build 120 env ADALORA_KERNELS_BUILD=cuda MAX_JOBS="${MAX_JOBS:-12}" \
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" "$python" setup.py build_ext --inplace
  has_cuda_library && return
  [[ -e $carried ]] && export ADALORA_KERNELS_LIBRARY=$carried
}

gpu_tests() {
  # Nearly all of the time goes into compiling kernels.
  local parallel=()
  "$python" -c "import xdist" 2>/dev/null && parallel=(-n 12)
  required "gpu tests" 130 "$python" -m pytest -m gpu -rfE --durations=10 \
    --continue-on-collection-errors "${parallel[@]}"
}

# sanitizer TOOL FILE EXPRESSION KERNEL...: tests under compute-sanitizer; only our kernels, by
# parts of their names, are instrumented. Without torch's cache each tensor is its own allocation.
sanitizer() {
  local tool=$1 file=$2 expression=$3 name=${2##*/test_} kernel kernels=()
  shift 3
  for kernel in "$@"; do kernels+=(--kernel-name "kns=$kernel"); done
  required "$tool ${name%.py}" 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 10 "${kernels[@]}" \
    "$python" -m pytest -m gpu "$file" -k "$expression"
}

# The Triton kernels by their names, the CUDA C++ kernels by their namespace.
memcheck() {
  local tool=${1:-memcheck}
  sanitizer "$tool" tests/test_svd_linear_kernels.py \
    "${SANITIZED:-test_every_path and not unaligned}" \
    _{down,gemm,low_rank_add,g_pass,g_reduce,x_pass,x_reduce}_kernel
  sanitizer "$tool" tests/test_importance.py "${CSRC_SANITIZED:-library-cuda}" adalora
}

racecheck() { memcheck racecheck; }

# A forward and backward of F.linear and of each path at 8192x4096x4096, r = 16.
profile() {
  local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_sector_hit_rate.pct
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
  optional profile 30 ncu --clock-control none --profile-from-start off --csv --page raw \
    --metrics "$metrics" --log-file "$out/profile.csv" "$python" -m benchmarks.bench_svd_linear
}

# Measures the plans of the goal shapes; what it writes is for kernels/svd_linear/launch_table.json.
tune() {
  optional tune 60 env ADALORA_KERNELS_CACHE="$out" \
    "$python" -m adalora_kernels --tune --rows 8192 2048 64 --ranks 16
}

# bench NAME MOST FILE: a bench for the time that is reserved for it, or up to MOST seconds if there
# is more. The last case may begin just before the end of its budget, hence the difference.
bench() {
  local seconds
  ((reserved -= least[$1]))
  seconds=$(left)
  ((seconds > $2)) && seconds=$2
  required "$1" "$seconds" "$python" -m pytest "benchmarks/bench_$3.py" --device cuda \
    --benchmark-timer=time.perf_counter --out "$out/results/$1.json" \
    --seconds $((seconds > 30 ? seconds - 20 : seconds / 2))
}

allocation() { bench allocation 80 whole_model; }
# What a layer costs the host, through either launcher, beside what the step takes.
host() { bench host 50 host; }
train_step() { bench train_step 300 train_step; }
svd_linear() { bench svd_linear 300 svd_linear; }

report() {
  ((reserved -= least[report]))
  required report "${least[report]}" "$python" -m benchmarks.report --results "$out/results" \
    --out build/gpu_report/RESULTS.md
}

stages="environment carried build gpu_tests memcheck racecheck profile tune allocation host
  train_step svd_linear report"
chosen=${*:-$stages}
for name in $chosen; do
  [[ " ${stages//$'\n'/ } " == *" $name "* ]] || { echo "no stage $name" >&2 && exit 2; }
  ((reserved += ${least[$name]:-0}))
done
for name in $chosen; do
  "$name"
done

echo
what='^== |^(FAILED|ERROR)|^[0-9]+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY'
sed '/^== report/,$d' "$log" | grep -E "$what" | sed 's/, at most .*//' | head -n 50
sed '1,/^== report/d' "$log" | tail -n 70
printf '%-30s %4d s  %s\n' "whole round" "$SECONDS" \
  "$( ((failed)) && echo FAILED || echo ok)" | tee -a "$summary"
exit "$failed"
