# Sourced by the batch scripts: start the ranks, pass signals on, requeue. Runs on the job's first node only.

fail() {
  local said="$*"
  printf 'error: node %s: %s\n' "${SLURMD_NODENAME:-$(hostname)}" "${said//[^[:print:]]/ }" >&2
  exit 2
}

# check_numbers NAME ...: variables that are set must be whole numbers. Bash's arithmetic would run commands in them.
check_numbers() {
  local name
  for name; do
    [[ ${!name-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$name is '${!name}', must be a whole number; unset it, or submit with sbatch"
  done
}

# run_ranks SCRIPT [ARGUMENT ...]: run a Python script of launch/ in every task of the job, and end as it ends.
run_ranks() {
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a SLURM job; submit it with sbatch, or run $1 itself"
  check_numbers SLURM_JOB_ID SLURM_NNODES SLURM_NTASKS SLURM_GPUS_ON_NODE SLURM_CPUS_PER_TASK
  ((${SLURM_NNODES:-0})) || fail "SLURM_NNODES is not set; submit it with sbatch"
  local tasks=${SLURM_NTASKS:-$SLURM_NNODES} gpus=$((${SLURM_GPUS_ON_NODE:-0} * SLURM_NNODES))
  ((tasks % SLURM_NNODES == 0)) || fail "$tasks task(s) on $SLURM_NNODES nodes; give sbatch --ntasks-per-node"
  ((gpus == 0 || tasks == gpus)) ||
    fail "$tasks task(s) for $gpus GPUs, must be one for each; give sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE"

  # The ranks meet at rank 0's node, by the address that SLURM itself uses for it, at a port of this job's own.
  MASTER_ADDR=$(scontrol -o show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
  export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun has not taken it over from sbatch since SLURM 22.05
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

  # A signal to this script (--signal=B:..., preemption) becomes SIGUSR1 to every rank. Copies do no harm.
  trap 'kill -USR1 "$step" 2>/dev/null; interrupted=yes' USR1 TERM
  # A rank that died takes the others along: at once where they notice, after a minute where they wait for it. Not at
  # once by --kill-on-bad-exit: it would cut down ranks that are just leaving with 75.
  srun --kill-on-bad-exit=0 --wait=60 bash launch/slurm/rank.sh "$@" &
  local step=$! status interrupted=yes
  while [[ $interrupted ]]; do # a signal ends `wait` before the step ends
    interrupted=
    wait "$step"
    status=$?
  done

  # 75: checkpoint saved, more to do. 138: SIGUSR1 before the ranks could listen, or in a program that resumes anyway.
  # A job that scancel ended is not RUNNING any more, and stays ended.
  if ((status == 75 || status == 138)) && [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) == RUNNING ]]; then
    echo "requeue: job $SLURM_JOB_ID stopped with status $status and goes on from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}
