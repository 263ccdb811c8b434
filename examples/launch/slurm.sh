#!/usr/bin/env bash
# Train on several machines of a SLURM cluster, one launcher on each. The run folder is on a disk that all of them see.
#
#     sbatch --nodes 2 examples/launch/slurm.sh --recipe sd3.5-medium-8gpu --groups 128 --out "$HOME/runs/two-nodes"
#
# Submit the same line again when a machine was lost: the run goes on from its newest checkpoint.
#SBATCH --job-name=neighbor-grpo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

out=
words=("$@")
for ((i = 0; i < $#; i++)); do
    if [ "${words[i]}" = --out ]; then out=${words[i + 1]}; fi
done
[ -n "$out" ] || { echo "--out FOLDER is needed, on a disk that all machines see" >&2; exit 2; }
if [ -n "$(ls -A "$out/checkpoints" 2>/dev/null)" ]; then words+=(--resume); fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# When one machine is lost, the job ends on all of them.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --max_restarts 0 \
    --rdzv_backend c10d --rdzv_endpoint "$first:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m neighbor_grpo.cli train "${words[@]}"
