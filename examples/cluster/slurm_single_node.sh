#!/bin/bash
# Stage 2 on one node:  sbatch examples/cluster/slurm_single_node.sh [OPTIONS.yaml [more options of `trl-cwdpo cwdpo`]]
#SBATCH --job-name=cwdpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
# Three minutes before the time is up, the run saves a checkpoint and ends
#SBATCH --signal=USR1@180
set -euo pipefail

OPTIONS=${1:-examples/cluster/train.yaml}
ENGINE=${ENGINE:-examples/cluster/accelerate/zero2.yaml}

srun --kill-on-bad-exit=1 trl-cwdpo cwdpo --config "$OPTIONS" "${@:2}" \
    --accelerate_config "$ENGINE" --num_processes "${SLURM_GPUS_ON_NODE:-8}"
