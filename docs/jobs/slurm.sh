#!/usr/bin/env bash
# A SLURM job that trains on several nodes of 8 GPUs, saves before its time is over, and goes on.
#
#     CONFIG=configs/vit_b_gaudi.py WORKDIR=/shared/runs/vit_b sbatch docs/jobs/slurm.sh
#
# To end it for good: touch $WORKDIR/stop, then scancel --signal=TERM JOB, which saves first.
#
#SBATCH --job-name=gaudi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gaudi-%j.log
set -euo pipefail
: "${CONFIG:?give the config file}" "${WORKDIR:?give a directory that all nodes see}"
source .venv/bin/activate

# One process for each GPU; each finds the others through SLURM's variables. Workers decode images,
# and are counted for each process.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" python main.py --config="$CONFIG" --workdir="$WORKDIR" --config.data.workers=10 "$@"

# The run has saved and ended well, but is it at its end? Then there is a summary.
if [[ ! -e "$WORKDIR/summary.json" && ! -e "$WORKDIR/stop" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
