#!/bin/bash
# Stage 2 on several nodes that share a folder:  sbatch --nodes=4 examples/cluster/slurm_multi_node.sh [OPTIONS.yaml [more]]
# Submitted again, or requeued after a node failed, it goes on from the last complete checkpoint.
#SBATCH --job-name=cwdpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -euo pipefail

OPTIONS=${1:-examples/cluster/train.yaml}
ENGINE=${ENGINE:-examples/cluster/accelerate/zero3.yaml}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))

# One launcher a node; SLURM_NODEID differs from node to node, so it is read there
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec trl-cwdpo cwdpo "$@" --machine_rank "$SLURM_NODEID"' cwdpo \
    --config "$OPTIONS" "${@:2}" --accelerate_config "$ENGINE" \
    --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" \
    --main_process_ip "$FIRST" --main_process_port "$PORT"
