#!/usr/bin/env bash
# mac_check.sh: what a Mac can tell us in 15 minutes: doctor, tests on its GPU, speed, loader, and PyTorch beside it
# where torch is installed. Writes results/mac_check.json, the one file to send back. It runs on Linux too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
out=results/mac_check
mkdir -p "$out"

part() {  # part NAME SECONDS COMMAND...: run it, keep what it prints and how it ended, go on whatever happens
    local name=$1 limit=$2 began=$SECONDS; shift 2
    echo "== $name"
    python - "$limit" "$@" > "$out/$name.log" 2>&1 <<'PYTHON'
import subprocess, sys
try:
    sys.exit(subprocess.run(sys.argv[2:], timeout=float(sys.argv[1])).returncode)
except subprocess.TimeoutExpired:
    sys.exit(124)
PYTHON
    local status=$?
    echo "{\"status\": $status, \"seconds\": $((SECONDS - began))}" > "$out/$name.status"
    tail -n 1 "$out/$name.log"
}

quick=(); rows=default; models='192x12:4,8,12 384x6:2,4,6 384x12:4,8,12'
if [ "$(uname)" != Darwin ]; then quick=(--quick); rows=tiny; fi

part doctor 60 mlx-hjepa doctor --json
part tests 240 python -m pytest tests/test_vit.py tests/test_hjepa.py tests/test_step.py tests/test_masks.py \
    tests/test_augment.py tests/test_knn.py tests/test_linear.py
part resume 120 python -m pytest tests/integration
if [ ${#quick[@]} -eq 0 ]; then
    part throughput 300 python benchmarks/throughput.py --models "$models" --batches 32,128 --out "$out/throughput"
else
    part throughput 300 python benchmarks/throughput.py "${quick[@]}" --out "$out/throughput"
fi
part loader 60 python benchmarks/loader.py --seconds 1 --out "$out/loader"
if python -c 'import torch' 2> /dev/null; then
    part versus_torch 240 python benchmarks/versus_torch.py --rows "$rows" --batches 32 --rounds 3 --out "$out/versus_torch"
fi

python - "$out" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
parts = {}
for status in sorted(folder.glob("*.status")):
    log = status.with_suffix(".log").read_text(errors="replace")
    found = json.loads(status.read_text()) | {"log": log[-4000:]}
    for file in sorted((folder / status.stem).glob("*.json")):
        found["result"] = json.loads(file.read_text())
    parts[status.stem] = found
target = folder.with_suffix(".json")
target.write_text(json.dumps(parts, indent=1))
print(f"\nwritten to {target}: please send it with an issue of the project")
for name, found in parts.items():
    print(f"  {name:12} {'ok' if found['status'] == 0 else 'status ' + str(found['status']):10} {found['seconds']} s")
PYTHON
