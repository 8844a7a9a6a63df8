#!/usr/bin/env bash
# mac_check.sh: what a Mac can tell us in 15 minutes at most: doctor, tests on its GPU, speed, loader, and PyTorch beside
# it where torch is installed. Writes results/mac_check.json, the one file to send back. It runs on Linux too.
# MAC_CHECK_DRY=FOLDER: every part in its shortest form, written there; MAC_CHECK_SECONDS: another end (for the tests).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
out=${MAC_CHECK_DRY:-results}/mac_check
deadline=${MAC_CHECK_SECONDS:-890}  # from the start; the rest is for the file
rm -rf "$out" "$out.json"
mkdir -p "$out"

part() {  # part NAME SECONDS COMMAND...: run it, keep what it prints and how it ended, go on whatever happens
    local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)); shift 2
    limit=$((limit < left ? limit : left))
    echo "== $name"
    python - "$limit" "$@" > "$out/$name.log" 2>&1 <<'PYTHON'
import subprocess, sys
try:
    sys.exit(subprocess.run(sys.argv[2:], timeout=float(sys.argv[1])).returncode)
except subprocess.TimeoutExpired:
    sys.exit(124)
PYTHON
    local status=$?
    echo "{\"status\": $status, \"seconds\": $((SECONDS - began)), \"limit\": $limit}" > "$out/$name.status"
    tail -n 1 "$out/$name.log"
}

unit=(tests/test_{vit,hjepa,step,masks,augment,knn,linear}.py); runs=(tests/integration); load=(--seconds 1)
if [ -n "${MAC_CHECK_DRY:-}" ]; then
    unit=(tests/test_masks.py); runs=(--collect-only tests/integration); load=(--seconds 0.01 --batch 8)
    speed=(--quick --models 32x2:1,2 --batches 2,4); torch=(--models 32x2:1,2 --batches 2 --rounds 1 --seconds 0.1)
elif [ "$(uname)" = Darwin ]; then
    speed=(--models '192x12:4,8,12 384x6:1,2,3,4,5,6 384x12:4,8,12' --batches 32,128); torch=(--batches 32 --rounds 3)
else
    speed=(--quick); torch=(--rows tiny --batches 32 --rounds 3)
fi

part doctor 60 mlx-hjepa doctor --json
part tests 240 python -m pytest "${unit[@]}"
part resume 120 python -m pytest "${runs[@]}"
part throughput 300 python benchmarks/throughput.py "${speed[@]}" --out "$out/throughput"
part loader 60 python benchmarks/loader.py "${load[@]}" --out "$out/loader"
if python -c 'import torch' 2> /dev/null; then
    part versus_torch 240 python benchmarks/versus_torch.py "${torch[@]}" --out "$out/versus_torch"
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
