#!/usr/bin/env bash
# Many nodes on SLURM: sbatch configs/slurm.sh --model.policy MODEL --data.train pairs.jsonl
# Lightning reads ranks and addresses from SLURM: one task for each GPU. SLURM's warning (SIGTERM, 120 s before the end)
# saves the run; send the job again with --ckpt_path last to go on.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=SIGTERM@120
#SBATCH --time=24:00:00
set -euo pipefail
source .venv/bin/activate
srun python -m bdpo_pl.fit --config configs/fsdp2_many_nodes.yaml "$@"
