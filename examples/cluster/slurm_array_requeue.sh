#!/bin/bash
# One run for each seed, on nodes that may be taken away:  sbatch examples/cluster/slurm_array_requeue.sh [OPTIONS.yaml [more]]
# At SIGTERM (preemption) or SIGUSR1 (end of the time limit) a run saves a checkpoint and ends with 143 or 138; the job
# then goes back into the queue and continues from there.
#SBATCH --job-name=cwdpo-seeds
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -uo pipefail

OPTIONS=${1:-examples/cluster/train.yaml}
ENGINE=${ENGINE:-examples/cluster/accelerate/zero2.yaml}
MOST_RESTARTS=${MOST_RESTARTS:-50}

srun --kill-on-bad-exit=1 trl-cwdpo cwdpo --config "$OPTIONS" "${@:2}" \
    --seed "$SLURM_ARRAY_TASK_ID" --output_dir "outputs/seed-$SLURM_ARRAY_TASK_ID" --resume_from_checkpoint auto \
    --accelerate_config "$ENGINE" --num_processes "${SLURM_GPUS_ON_NODE:-8}"
code=$?

if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MOST_RESTARTS" ]; then
        echo "Stopped $MOST_RESTARTS times: not requeued. Submit it again to go on." >&2
        exit "$code"
    fi
    echo "Stopped by a signal ($code): back into the queue."
    # Where the scheduler itself requeues what it preempts, this one comes too late, and need not be heard
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
