#!/usr/bin/env bash
# Everything that tells whether the project is sound: set-up, linters, types, scripts, tests. Fast checks first.
#   bash tests/run.sh             all of it (about 21 minutes on 2 cores, set-up included)
#   bash tests/run.sh -k bridge   arguments go to pytest, in place of the linters

set -euo pipefail
# shellcheck source=recipes/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/common.sh"
BUILD_OPS=(--offload)
if [[ -e /usr/include/libaio.h ]]; then
  BUILD_OPS+=(--disk)
else
  printf 'note: libaio-dev is not installed, so the tests of a teacher on disk are skipped\n'
fi
command -v slurmctld >/dev/null || [[ -x /usr/sbin/slurmctld ]] ||
  printf 'note: slurmctld, slurmd, slurm-client, munge are not installed, so the tests on a Slurm cluster are skipped\n'
command -v chromium >/dev/null ||
  printf 'note: chromium is not installed, so the tests of the report in a browser are skipped\n'
setup_environment requirements.txt requirements-eval.txt requirements-real.txt requirements-wandb.txt tests/requirements.txt

pytest=("$PYTHON" -m pytest)
if (($#)); then
  exec "${pytest[@]}" "$@"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two files of tests at a time
pytest+=(--numprocesses 2 --dist loadfile --no-loadscope-reorder)

bin=$(dirname "$PYTHON")
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
printf '== ruff, mypy, shellcheck\n'
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
for script in "${scripts[@]}"; do bash -n "$script"; done
"$bin/shellcheck" -x "${scripts[@]}"

printf '== unit tests\n'
"${pytest[@]}" -m "not slow and not ranks"
printf '== multi-rank tests and whole commands\n'
"${pytest[@]}" -m "slow or ranks"
