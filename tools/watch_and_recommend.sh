#!/bin/sh
# Watch a run, the newest by default; when it ends, analyse it and say what to run next.
exec mlx-hjepa watch "$@"
