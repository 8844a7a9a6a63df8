#!/usr/bin/env bash
# watch_and_recommend.sh [RUN]: watch a run, the newest by default; when it ends, analyse it and say what to run next.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
exec mlx-hjepa watch "$@"
