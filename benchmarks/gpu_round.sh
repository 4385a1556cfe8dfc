#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go and within eight minutes:
#
#   bash benchmarks/gpu_round.sh           # every stage
#   bash benchmarks/gpu_round.sh STAGE...  # some, each then with more of the time
#
# Writes log.txt, svd_linear_gpu.json, svd_linear_gpu.txt, profile.csv, launch_table.json and
# summary.txt to $OUT (build/gpu_round by default) and prints the summary and the benchmark's short
# table last. A stage that fails ends nothing but makes the exit status 1; only the profile and the
# tuning may fail. The stages are listed at the end of this file.
set -uo pipefail

cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu_round}
seconds_in_all=${ROUND_SECONDS:-475}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" || exit
log=$out/log.txt summary=$out/summary.txt
: >"$log"
: >"$summary"
failed=0

left() { echo $((seconds_in_all - SECONDS > 1 ? seconds_in_all - SECONDS : 1)); }

# stage NAME LIMIT COMMAND...: run the command for at most LIMIT seconds, and what is left in all.
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 outcome=ok
  shift 2
  ((limit > $(left))) && limit=$(left)
  printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*" >>"$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
  case $status in
    0) ;;
    124 | 137) outcome="FAILED: not done after $limit s" ;;
    *) outcome="FAILED: exit status $status" ;;
  esac
  printf '%-18s %4d s  %s\n' "$name" $((SECONDS - start)) "$outcome" | tee -a "$summary"
  ((status == 0))
}

required() { stage "$@" || failed=1; }
optional() { stage "$@" || true; }

environment() {
  required environment 30 bash -c "
    command -v nvidia-smi >/dev/null &&
      nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    command -v nvcc >/dev/null && nvcc --version | tail -n 2
    $python -m adalora_kernels"
}

gpu_tests() {
  local parallel=()
  # Nearly all of the time goes into compiling kernels.
  "$python" -c "import xdist" 2>/dev/null && parallel=(-n 12)
  required "gpu tests" 180 "$python" -m pytest -m gpu -rfE --durations=10 \
    --continue-on-collection-errors "${parallel[@]}"
}

# Only our kernels are instrumented. Without torch's cache every tensor is an allocation of its own.
sanitizer() {
  local kernels=() kernel
  for kernel in down gemm low_rank_add g_pass g_reduce x_pass x_reduce; do
    kernels+=(--kernel-name "kns=${kernel}_kernel")
  done
  required "$1" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 10 "${kernels[@]}" \
    "$python" -m pytest tests/test_svd_linear_kernels.py \
    -k "${SANITIZED:-test_every_path and not unaligned}"
}

# A forward and backward of F.linear and of each path at 8192x4096x4096, r = 16.
profile() {
  local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,lts__t_sector_hit_rate.pct,launch__registers_per_thread
  optional "profile (optional)" 40 ncu --clock-control none --profile-from-start off --csv --page raw \
    --metrics "$metrics" --log-file "$out/profile.csv" \
    "$python" -m benchmarks.gpu_svd_linear --profile --out "$out"
}

# Last, with all the time that is left, so that its table ends the output.
svd_linear() {
  local seconds=$(($(left) - 20))
  ((seconds > 270)) && seconds=270
  required svd_linear $((seconds + 20)) \
    "$python" -m benchmarks.gpu_svd_linear --out "$out" --seconds "$seconds"
}

# Measures the plans of the goal shapes; what it writes is for adalora_kernels/kernels.
tune() {
  optional tune 90 env ADALORA_KERNELS_CACHE="$out" \
    "$python" -m adalora_kernels --tune --rows 8192 2048 64 --ranks 16
}

for name in "${@:-environment gpu_tests memcheck racecheck profile tune svd_linear}"; do
  for each in $name; do
    case $each in
      memcheck | racecheck) sanitizer "$each" ;;
      environment | gpu_tests | profile | tune | svd_linear) "$each" ;;
      *) echo "no stage $each" >&2 && exit 2 ;;
    esac
  done
done

echo
what='^== |^(FAILED|ERROR)|^[0-9]+ (passed|failed|error)|(ERROR|RACECHECK) SUMMARY'
sed '/^== svd_linear/,$d' "$log" | grep -E "$what" | sed 's/, at most .*//' | head -n 40
sed '1,/^== svd_linear/d' "$log" | tail -n 60
printf '%-18s %4d s  %s\n' "whole round" "$SECONDS" \
  "$( ((failed)) && echo FAILED || echo ok)" | tee -a "$summary"
exit "$failed"
