#!/usr/bin/env bash
# eval_after_training.sh [RUN]: every evaluation of a run, the newest by default, and the summary.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
mlx-hjepa eval --all "$@"
