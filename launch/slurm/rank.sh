# Run by srun once per rank: SLURM's variables under the names that torch and DeepSpeed read, then Python in this shell's
# place. No launcher in between: signals reach the ranks as they are, and nobody kills them 30 s after SIGTERM.

for name in SLURM_PROCID SLURM_NTASKS SLURM_LOCALID SLURM_NNODES; do # arithmetic would run commands in them
  [[ ${!name-} =~ ^(0|[1-9][0-9]{0,8})$ ]] || {
    echo "error: $name is not a whole number; start the ranks by launch/slurm/train.sbatch or evaluate.sbatch" >&2
    exit 2
  }
done
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

PYTHON=(.venv/bin/python)
site=${NEUROADA_SITE:-launch/slurm/site.sh}
# shellcheck source=/dev/null
[[ ! -f $site ]] || source "$site"

if ! command -v "${PYTHON[0]}" >/dev/null; then
  ((LOCAL_RANK)) || echo "error: node $SLURMD_NODENAME: no ${PYTHON[0]} in $PWD; make the virtual environment where every node sees it, or set PYTHON in $site" >&2
  exit 2
fi
exec "${PYTHON[@]}" "$@"
