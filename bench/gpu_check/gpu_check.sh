#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in one call; what it finds goes to gpu-check/.
# Uses the Python that holds a CUDA build of torch (PYTHON=python3), with transformers, safetensors,
# pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis in it. Nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${GPU_CHECK_OUT:-gpu-check}
site=$PWD/build/gpu-site
mkdir -p "$out"
failed=()

part() {  # NAME COMMAND...: runs a part, keeps its log, remembers a failure
  local name=$1
  shift
  echo "== $name"
  local start=$SECONDS
  if "$@" >"$out/$name.log" 2>&1; then
    echo "   ok, $((SECONDS - start)) s"
  else
    echo "   FAILED (exit $?), $((SECONDS - start)) s; end of $out/$name.log:"
    tail -n "${GPU_CHECK_TAIL:-25}" "$out/$name.log"
    failed+=("$name")
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
part install "$python" -m pip install --no-build-isolation --no-deps --upgrade --target "$site" .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
part doctor "$python" -X faulthandler -m penstock doctor
cat "$out/doctor.log"
part configure cmake --preset release
part compile cmake --build --preset release
part cpp-tests ctest --preset release --no-tests=error -j 8
part gpu-tests "$python" -m pytest -q --require-gpu tests/gpu -p no:cacheprovider
tail -n 3 "$out/gpu-tests.log"
part model "$python" -m bench.gpu_check --json "$out/model.json"
cat "$out/model.log"
part allocator "$python" -m bench.allocator --json "$out/allocator.json"
cat "$out/allocator.log"
part bench-quick "$python" -m penstock bench --quick --json "$out/bench-quick.json"
cat "$out/bench-quick.log"
part microbenchmarks build/release/bench/cpp/penstock_bench \
  --benchmark_out="$out/microbenchmarks.json" --benchmark_out_format=json
if command -v compute-sanitizer >/dev/null; then
  # Leaks are looked for in the C++ tests only: torch keeps its own allocations to the end. These
  # tests make calls fail on purpose, which is no error of theirs.
  part sanitizer-cpp compute-sanitizer --tool memcheck --error-exitcode 9 --leak-check full \
    --report-api-errors no \
    build/release/tests/cpp/penstock_tests --gtest_filter='*Cuda*'
  part sanitizer-python compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -q --require-gpu tests/gpu -p no:cacheprovider
  tail -qn 2 "$out/sanitizer-cpp.log" "$out/sanitizer-python.log"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu-check: FAILED: ${failed[*]}"
  exit 1
fi
echo "gpu-check: all parts passed"
